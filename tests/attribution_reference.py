"""Of eight architectures, read off their own code: where heads are projected, and what is done to what they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import zoo
from architectures import prompt_ids
from architectures import shared as shared_tiny
from torch import Tensor, nn


def one(_: Any) -> float:
    return 1.0


class Place(NamedTuple):
    """Of each layer of a model: (attention's projection, MLP's last module), norms behind them, multipliers; then the head.

    `norm`: "rms", "rms+1" (a gain of 1 + weight) or "layer".
    """

    layers: str
    projection: str
    mlp: str
    final: str
    unembedding: str = "lm_head"
    norm: str = "rms"
    after: tuple[str, str] | None = None
    attention_scale: Callable[[Any], float] = one
    mlp_scale: Callable[[Any], float] = one
    logit_scale: Callable[[Any], float] = one
    cap: Callable[[Any], float | None] = lambda _: None


_LLAMA = Place("model.layers", "self_attn.o_proj", "mlp", "model.norm")
PLACES: dict[str, Place] = {
    "gpt2": Place("transformer.h", "attn.c_proj", "mlp", "transformer.ln_f", norm="layer"),
    "llama": _LLAMA,
    "gemma2": _LLAMA._replace(
        norm="rms+1",
        after=("post_attention_layernorm", "post_feedforward_layernorm"),
        cap=lambda config: config.final_logit_softcapping,
    ),
    "cohere": _LLAMA._replace(norm="layer", logit_scale=lambda config: config.logit_scale),
    "granite": _LLAMA._replace(
        attention_scale=lambda config: config.residual_multiplier,
        mlp_scale=lambda config: config.residual_multiplier,
        logit_scale=lambda config: 1 / config.logits_scaling,
    ),
    "gpt_oss": _LLAMA,
    "bloom": Place("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", "transformer.ln_f", norm="layer"),
    "falcon_h1": Place(
        "model.layers",
        "self_attn.o_proj",
        "feed_forward",
        "model.final_layernorm",
        attention_scale=lambda config: config.attention_out_multiplier,
        logit_scale=lambda config: config.lm_head_multiplier,
    ),
}
TYPES = tuple(PLACES)


def shared(model_type: str) -> Any:
    return zoo.shared(model_type) if model_type == "falcon_h1" else shared_tiny(model_type)


def ids(model_type: str, seed: int = 0, seq: int = 9) -> Tensor:
    if model_type == "falcon_h1":
        return zoo.ids(shared(model_type), seq=seq, seed=seed)
    return prompt_ids(seq=seq, seed=seed)


def frozen(norm: nn.Module, kind: str, at: Tensor, part: Tensor) -> Tensor:
    """What `norm` makes of `part`, with the scale that it has for `at`; its bias is left out."""
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    weight = norm.weight + 1 if kind == "rms+1" else norm.weight
    if kind == "layer":
        at, part = at - at.mean(-1, keepdim=True), part - part.mean(-1, keepdim=True)
    return part / (at.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def inputs_and_outputs(hf: nn.Module, token_ids: Tensor) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """Of every module, by plain hooks, what it was given first and what it gave."""
    given: dict[nn.Module, Tensor] = {}
    gave: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        value = args[0] if args else kwargs.get("hidden_states")
        if isinstance(value, Tensor):
            given[module] = value.clone()
        output = output if isinstance(output, Tensor) else output[0]
        if isinstance(output, Tensor):
            gave[module] = output.clone()

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in hf.modules()]
    try:
        with torch.no_grad():
            hf(token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return given, gave


def matrix(projection: nn.Module) -> Tensor:
    """(in, out), also of GPT-2's."""
    return projection.weight.detach() if type(projection).__name__ == "Conv1D" else projection.weight.detach().mT


def metric(logits: Tensor) -> Tensor:
    return logits[:, 20] - logits[:, 31]


def with_gradients(
    hf: nn.Module,
    token_ids: Tensor,
    points: dict[Any, tuple[nn.Module, str]],
    measure: Callable[[Tensor], Tensor] = metric,
    put: Callable[[Any, Tensor], Tensor] = lambda _, x: x,
) -> tuple[dict[Any, Tensor], dict[Any, Tensor], Tensor]:
    """The values at the points, the gradients of the metric with respect to them, and the metric, by plain hooks.

    Args:
        points: (module, "input" or "output").
        put: by the name of a point and its value, what the model goes on with.
    """
    seen: dict[Any, Tensor] = {}
    handles = []
    for name, (module, kind) in points.items():

        def pre(_: nn.Module, args: Any, kwargs: Any, name: Any = name) -> Any:
            seen[name] = put(name, args[0] if args else kwargs["hidden_states"])
            return ((seen[name], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": seen[name]})

        def post(_: nn.Module, __: Any, output: Any, name: Any = name) -> Any:
            seen[name] = put(name, output if isinstance(output, Tensor) else output[0])
            return seen[name] if isinstance(output, Tensor) else (seen[name], *output[1:])

        handles.append(
            module.register_forward_pre_hook(pre, with_kwargs=True)
            if kind == "input"
            else module.register_forward_hook(post)
        )
    try:
        with torch.enable_grad():
            value = measure(hf(token_ids, use_cache=False).logits[:, -1])
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(value.sum(), list(seen.values()), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(seen.values(), gradients, strict=True)]
    detached = {name: x.detach() for name, x in seen.items()}
    return detached, dict(zip(seen, filled, strict=True)), value.detach()
