"""Activations of one token of each prompt, under nnterp's names and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.positions import mask_of
from nnatomy.methods.prompts import left_padded
from nnatomy.standardized import StandardizedTransformer

#: From the model and a layer, inside a trace, to a value of (batch, seq, hidden).
GetActivations = Callable[[StandardizedTransformer, int], Tensor]


def _layer_output(model: StandardizedTransformer, layer: int) -> Tensor:
    return model.layers_output[layer]


@torch.no_grad()
def get_token_activations(
    model: StandardizedTransformer,
    prompts: Any = None,
    layers: Sequence[int] | None = None,
    get_activations: GetActivations | None = None,
    idx: int | None = None,
    tracer: Any = None,
) -> Float[Tensor, "layer prompt hidden"]:
    """The value at one token of each prompt, after each layer.

    Args:
        prompts: what `model.trace` takes; None inside a trace.
        layers: which, in any order; all if None.
        get_activations: what to read of a layer, `model.layers_output[layer]` if None.
        idx: which token of each prompt, its last (-1) if None. Counted in the prompt itself: padding has no index.
        tracer: the trace that is open, to read from it; a new one if None.

    Returns:
        On the CPU; in an open trace, on the device of the first layer's values.

    Raises:
        InputError: if there are neither prompts nor a trace, or a prompt has no such token.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import get_token_activations
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> get_token_activations(model, ["The capital of France is", "Japan is in"], layers=[2, 4]).shape
        torch.Size([2, 2, 96])
    """
    if tracer is None:
        if prompts is None:
            raise InputError("There are no prompts: give some, or a trace that is open (tracer=...).")
        with model.trace(left_padded(prompts), use_cache=False):
            found = _read(model, layers, get_activations or _layer_output, idx)
        return found.cpu()
    return _read(model, layers, get_activations or _layer_output, idx)


def _read(
    model: StandardizedTransformer, layers: Sequence[int] | None, get: GetActivations, idx: int | None
) -> Float[Tensor, "layer prompt hidden"]:
    every = range(model.num_layers)
    wanted = list(every) if layers is None else [every[layer] for layer in layers]
    at = -1 if idx is None else idx
    given, _ = model._root_inputs("attention_mask")
    mask = mask_of(given) if "decoder_input_ids" in given else model.attention_mask
    lengths = mask.sum(-1)
    if not bool(((at < lengths) & (-at <= lengths)).all()):
        raise InputError(f"idx={at}: the shortest prompt has {int(lengths.min())} tokens.")
    column = (
        mask.shape[-1] - lengths + at if at >= 0 else lengths.new_full(lengths.shape, mask.shape[-1] + at)
    )
    rows = torch.arange(len(mask))
    found: dict[int, Tensor] = {}
    for layer in sorted(set(wanted)):  # in the order of the forward pass
        value = get(model, layer)
        found[layer] = value[rows.to(value.device), column.to(value.device)]
    device = found[min(found)].device
    return torch.stack([found[layer].to(device) for layer in wanted])


def collect_token_activations_batched(
    model: StandardizedTransformer,
    prompts: Sequence[Any],
    batch_size: int,
    layers: Sequence[int] | None = None,
    get_activations: GetActivations | None = None,
    idx: int | None = None,
    tqdm: Callable[[Iterable[int]], Iterable[int]] | None = None,
    use_session: bool = True,  # noqa: ARG001
) -> Float[Tensor, "layer prompt hidden"]:
    """`get_token_activations` of many prompts, `batch_size` at a time. (`collect_activations` sorts them by length.)

    Args:
        model, prompts, layers, get_activations, idx: as there.
        tqdm: what to show progress with: `tqdm.tqdm`, or another that wraps an iterable.
        use_session: nnterp's; makes no difference here.
    """
    starts: Iterable[int] = range(0, len(prompts), batch_size)
    if not prompts:
        raise InputError("There are no prompts to collect activations of.")
    return torch.cat(
        [
            get_token_activations(model, prompts[start : start + batch_size], layers, get_activations, idx)
            for start in (starts if tqdm is None else tqdm(starts))
        ],
        dim=1,
    )


def collect_last_token_activations_session(
    model: StandardizedTransformer,
    prompts: Sequence[Any],
    batch_size: int,
    layers: Sequence[int] | None = None,
    get_activations: GetActivations | None = None,
    idx: int | None = None,
) -> Float[Tensor, "layer prompt hidden"]:
    """`collect_token_activations_batched`, under its other name in nnterp."""
    return collect_token_activations_batched(model, prompts, batch_size, layers, get_activations, idx)
