"""Activations of one token of each prompt, under nnterp's names and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError, a_kind
from nnatomy.methods.arguments import method
from nnatomy.methods.prompts import Prompt, plain
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import OwnPositions, is_fake, numbers, own_positions

#: From the model and a layer, inside a trace, to a value of (batch, seq, hidden).
GetActivations = Callable[[StandardizedTransformer, int], Tensor]


def _layer_output(model: StandardizedTransformer, layer: int) -> Tensor:
    return model.layers_output[layer]


@method
@torch.no_grad()
def get_token_activations(
    model: StandardizedTransformer,
    prompts: Any = None,
    *,
    layers: int | Sequence[int] | None = None,
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
        with model.trace(plain(prompts), use_cache=False):
            found = _read(model, layers, get_activations or _layer_output, idx)
        return found.cpu()
    return _read(model, layers, get_activations or _layer_output, idx)


def _read(
    model: StandardizedTransformer, layers: int | Sequence[int] | None, get: GetActivations, idx: int | None
) -> Float[Tensor, "layer prompt hidden"]:
    every = range(model.num_layers)
    chosen = every if layers is None else numbers("layers", layers)
    if layers is not None:
        for layer in chosen:
            model.layers_output.module(layer)  # raises where there is none
    wanted = [every[layer] for layer in chosen]
    at = -1 if idx is None else idx
    found: dict[int, Tensor] = {}
    for layer in sorted(set(wanted)):  # in the order of the forward pass
        value = get(model, layer)
        if not isinstance(value, Tensor) or value.ndim < 2:
            raise InputError(
                f"get_activations gave {a_kind(value)} of layer {layer}, and no tensor of (batch, seq, ...)."
            )
        if is_fake(value):
            found[layer] = value[:, -1]
            continue
        own = _own_positions(model, get, value.shape[:2])
        rows = torch.arange(len(value))
        column, _ = own.columns(torch.full_like(rows, at), rows)
        found[layer] = value[rows.to(value.device), column.to(value.device)]
    device = found[min(found)].device
    return torch.stack([found[layer].to(device) for layer in wanted])


def _own_positions(model: StandardizedTransformer, get: GetActivations, shape: torch.Size) -> OwnPositions:
    """Those of what a decoder reads, or where the user reads a value of an encoder, of what that reads."""
    may_be_of_encoder = model._prompts.decoder_start is not None and get is not _layer_output
    found, errors = [], []
    for of_encoder in (False, True)[: 1 + may_be_of_encoder]:
        try:
            found.append(own_positions(model, "get_token_activations", shape, of_encoder))
        except InputError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    if not torch.equal(found[0].own, found[-1].own):
        raise InputError(
            f"get_token_activations: what the encoder reads and what the decoder reads are both of {tuple(shape)} prompts and "
            "positions, and not padded alike, so that nothing says which of them get_activations gave values of. Give prompts of "
            "one length, or take collect_activations(model, prompts, 'encoder_layers_output')."
        )
    return found[0]


@method
def collect_token_activations_batched(
    model: StandardizedTransformer,
    prompts: Sequence[Any],
    *,
    batch_size: int,
    layers: int | Sequence[int] | None = None,
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
    if isinstance(prompts, (str, Prompt)):
        prompts = [prompts]
    starts: Iterable[int] = range(0, len(prompts), batch_size)
    if not prompts:
        raise InputError("There are no prompts to collect activations of.")
    return torch.cat(
        [
            get_token_activations(
                model, prompts[start : start + batch_size], layers=layers, get_activations=get_activations, idx=idx
            )
            for start in (starts if tqdm is None else tqdm(starts))
        ],
        dim=1,
    )


@method
def collect_last_token_activations_session(
    model: StandardizedTransformer,
    prompts: Sequence[Any],
    *,
    batch_size: int,
    layers: int | Sequence[int] | None = None,
    get_activations: GetActivations | None = None,
    idx: int | None = None,
) -> Float[Tensor, "layer prompt hidden"]:
    """`collect_token_activations_batched`, under its other name in nnterp."""
    return collect_token_activations_batched(
        model, prompts, batch_size=batch_size, layers=layers, get_activations=get_activations, idx=idx
    )
