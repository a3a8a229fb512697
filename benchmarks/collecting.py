"""Collecting the last token's activations of many prompts of mixed length, after layer 6 of 12.

    python benchmarks/collecting.py [--json FILE] [--rounds N]

A random Llama of GPT-2's size, whose values padding does not change, so that everybody's can be compared; prompts of 4 to 64
numbered words, all lengths as often, or of up to 512, most of them short. ours: `collect_activations`, at most 1024 tokens a pass.
hooks: 16 prompts a pass in the given order, the whole forward pass. nnsight: the same, stopped after the layer; nnterp: its
`collect_token_activations_batched`, 16 prompts a pass. The floor is the layers up to that one
on as many tokens as the prompts have. The rest is as in `tables.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from llama import llama, run_unpadded, wrapped
from measuring import nnsight, nnterp
from tables import Task, main
from torch import Tensor
from words import make_long_tailed, make_prompts, make_tokenizer

from nnatomy import StandardizedTransformer
from nnatomy.methods import collect_activations

LAYER, BATCH = 6, 16


def task(prompts: list[str]) -> Task:
    """Each contender gives (prompt, hidden)."""
    hf, tokenizer = llama(), make_tokenizer()
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    model = StandardizedTransformer(hf, tokenizer)

    def ours() -> Tensor:
        points = {"layers_output": [LAYER]}
        found = collect_activations(model, prompts, points=points, progress=False)
        return found["layers_output", LAYER]

    def hooks() -> Tensor:
        rows: list[Tensor] = []
        handle = hf.model.layers[LAYER].register_forward_hook(lambda _, __, output: rows.append(output[:, -1]))
        for batch in batches:
            hf(**tokenizer(batch, padding=True, return_tensors="pt", return_token_type_ids=False))
        handle.remove()
        return torch.cat(rows)

    def floor() -> None:
        run_unpadded(hf, list(hf.model.layers[: LAYER + 1]), [len(prompt.split()) for prompt in prompts])

    contenders: dict[str, Any] = {"ours": ours, "hooks": hooks}
    if nnsight is not None:
        sight = wrapped(hf, tokenizer)

        def with_nnsight() -> Tensor:
            rows = []
            for batch in batches:
                with sight.trace(batch) as tracer:
                    found = sight.model.layers[LAYER].output[:, -1].save()
                    tracer.stop()
                rows.append(found)
            return torch.cat(rows)

        contenders["nnsight"] = with_nnsight
    if nnterp is not None:
        from nnterp.nnsight_utils import collect_token_activations_batched

        other = nnterp.StandardizedTransformer(copy.deepcopy(hf), tokenizer=tokenizer)
        contenders["nnterp"] = lambda: collect_token_activations_batched(
            other, prompts, batch_size=BATCH, layers=[LAYER]
        )[0]
    return Task(contenders, floor, dict.fromkeys(("hooks", "nnterp"), 2.5))


if __name__ == "__main__":
    main(
        __doc__,
        {
            "2000 prompts of 4 to 64": lambda: task(make_prompts(2000, 4, 64)),
            "2000 prompts with a long tail": lambda: task(make_long_tailed(2000, 4, 512)),
            "64 prompts of 4 to 64": lambda: task(make_prompts(64, 4, 64)),
        },
        rounds=3,
    )
