"""Numbers may be numpy's, or a tensor of one, as an argmax gives them: the values are those of Python's.

A script, and no test module: the suite's own checks of types would refuse them. `test_whole_number.py` runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.methods import (
    activation_patching,
    collect_activations,
    direct_logit_attribution,
    head_ablation,
    logit_difference,
    logit_lens,
)

PROMPT, OTHER = "The capital of France is", "The capital of Japan is"

#: With one number, and with several.
ASKED: dict[str, Callable[[StandardizedTransformer, Any, Any], Tensor]] = {
    "lens": lambda model, one, several: torch.cat(
        [logit_lens(model, PROMPT, positions=one).flatten(), logit_lens(model, PROMPT, positions=several).flatten()]
    ),
    "patching": lambda model, one, several: (
        activation_patching(
            model, PROMPT, OTHER, metric=logit_difference(one, 7, model), layers=one, positions=several, progress=False
        ).effect
    ),
    "ablation": lambda model, one, several: (
        head_ablation(model, PROMPT, metric=logit_difference(one, 7), layers=one, heads=several, progress=False).effect
    ),
    "attribution": lambda model, one, several: (
        direct_logit_attribution(model, [PROMPT, OTHER], answer=several, wrong=one, position=one).effect
    ),
    "attribution of a cache": lambda model, one, _: (
        model.run_with_cache(PROMPT)[1].logit_attribution(one, position=one).effect
    ),
    "a cache": lambda model, one, several: model.run_with_cache(PROMPT, layers=several, positions=several)[
        1
    ].layers_output[one + 1],
    "composition": lambda model, one, several: model.composition_scores(one - 3, one, "K"),
    "weights": lambda model, one, _: torch.stack([model.W_Q.folded(one), model.OV(one).right.mT[: model.num_heads]]),
    "collecting": lambda model, _, several: collect_activations(
        model, [PROMPT], points={"layers_output": [1]}, positions=several, progress=False
    )["layers_output", 1],
}


def steps(model: StandardizedTransformer, which: Any) -> Tensor:
    with model.generate(PROMPT, max_new_tokens=np.int64(5), min_new_tokens=5) as tracer:  # type: ignore[arg-type]
        found = [model.logits[0, -1] for _ in tracer.iter[which]]
    return torch.stack(found)


def main() -> None:
    model = StandardizedTransformer("demo:gpt2", validate=False)
    for name, ask in ASKED.items():
        meant = ask(model, 3, [1, 4])
        assert torch.equal(ask(model, np.int64(3), np.array([1, 4])), meant), name
        assert torch.equal(ask(model, torch.tensor(3), torch.tensor([1, 4])), meant), name
    assert torch.equal(steps(model, np.int64(1)), steps(model, 1))
    assert torch.equal(steps(model, torch.tensor(1)), steps(model, 1))
    assert torch.equal(steps(model, torch.tensor([1, 3])), steps(model, [1, 3]))
    assert model.kv_head(torch.tensor(3)) == model.kv_head(3) == 3  # type: ignore[arg-type]
    for ids in (
        np.array([300, 301]),
        torch.tensor([300, 301]),
        [np.int64(300), np.int64(301)],
        [*torch.tensor([300, 301])],
    ):
        assert model.to_string(ids) == "CroatianCuba", ids
        assert model.to_string([ids]) == ["CroatianCuba"], ids
    assert model.to_string(np.int64(300)) == "Croatian"


if __name__ == "__main__":
    main()
