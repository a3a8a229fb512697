"""What each method gives, asked of any view of `demo:gpt2`: for tests of results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nnatomy.methods import (
    activation_patching,
    attribution_patching,
    causal_tracing,
    circuit_faithfulness,
    direct_logit_attribution,
    edge_attribution,
    head_ablation,
    head_scores,
    integrated_gradients,
    lens_statistics,
    logit_difference,
    logit_lens,
    path_patching,
)

CLEAN, OTHER = "The capital of France is", "The capital of Italy is"
THIRD, FOURTH = "The capital of Japan is", "The capital of Egypt is"


def my_own(logits: Tensor) -> Tensor:
    return logits[:, 7] - logits[:, 9]


def pair_of(m: Any) -> dict[str, Any]:
    return {"clean": CLEAN, "corrupted": OTHER, "metric": logit_difference(" Paris", " Rome", m)}


def _curve(m: Any) -> Any:
    return circuit_faithfulness(m, **pair_of(m), attribution=edge_attribution(m, **pair_of(m)), sizes=[1, 20])


#: What is plotted, the prompts in its title, and what names its metric there.
ASKS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...], str]] = {
    "activation_patching": (lambda m: activation_patching(m, **pair_of(m)), (CLEAN, OTHER), "logit_difference"),
    "a metric of one's own": (
        lambda m: activation_patching(m, CLEAN, OTHER, metric=my_own, layers=[1]),
        (CLEAN, OTHER),
        "my_own",
    ),
    "path_patching": (
        lambda m: path_patching(m, **pair_of(m), sender="mlps_contribution[0]", receivers="logits"),
        (CLEAN, OTHER),
        "logit_difference",
    ),
    "causal_tracing": (
        lambda m: causal_tracing(m, CLEAN, subject="France", samples=1, layers=[1]),
        (CLEAN,),
        "probability",
    ),
    "attribution_patching": (lambda m: attribution_patching(m, **pair_of(m)), (CLEAN, OTHER), "logit_difference"),
    "integrated_gradients": (
        lambda m: integrated_gradients(m, **pair_of(m), layers=[1], steps=1),
        (CLEAN, OTHER),
        "logit_difference",
    ),
    "edge_attribution": (lambda m: edge_attribution(m, **pair_of(m)), (CLEAN, OTHER), "logit_difference"),
    "circuit_faithfulness": (_curve, (CLEAN, OTHER), "logit_difference"),
    "direct_logit_attribution": (
        lambda m: direct_logit_attribution(m, CLEAN, answer=" Paris", wrong=" Rome"),
        (CLEAN,),
        "logit of ' Paris' less ' Rome'",
    ),
    "of a cache": (
        lambda m: m.run_with_cache([CLEAN, "Japan is in"])[1].logit_attribution(" Paris"),
        (CLEAN, "Japan is in"),
        "logit of ' Paris'",
    ),
    "head_scores": (lambda m: head_scores(m, CLEAN)["previous_token"], (CLEAN,), "Attention to previous token"),
    "head_ablation": (
        lambda m: head_ablation(m, CLEAN, metric=logit_difference(" Paris", " Rome", m)),
        (CLEAN,),
        "logit_difference",
    ),
    "test_prompt": (lambda m: m.test_prompt(CLEAN, " Paris."), (CLEAN,), "Probability of the answer"),
    "lens_statistics": (lambda m: lens_statistics(m, CLEAN), (CLEAN,), "probability"),
    "logit_lens": (lambda m: logit_lens(m, [CLEAN, THIRD], output="logits"), (CLEAN, THIRD), "logit"),
    "logit_lens of positions": (lambda m: logit_lens(m, CLEAN, positions=[0, 1]), (CLEAN,), "probability"),
    "logit_lens of all positions": (
        lambda m: logit_lens(m, [CLEAN, THIRD], positions="all")[1],
        (THIRD,),
        "probability",
    ),
}
