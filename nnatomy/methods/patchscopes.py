"""Patchscopes: a hidden state is put into another prompt, and the model says what it reads in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.methods.arguments import method
from nnatomy.methods.patched_rows import PatchedRows, of_rows
from nnatomy.methods.progress import shown
from nnatomy.methods.prompts import plain, prepared
from nnatomy.methods.target_prompts import TargetPrompt, TargetPromptBatch, repeat_prompt
from nnatomy.methods.tokens import refuse_encoder_decoder
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.positions import from_end, positions_from_end

Layers = int | Sequence[int] | None
Mapped = Callable[[Float[Tensor, "layer source _"]], Float[Tensor, "layer source hidden"]]


@method
@torch.no_grad()
def patchscope_lens(
    nn_model: StandardizedTransformer,
    source_prompts: Any = None,
    target_patch_prompts: str | TargetPrompt | Sequence[TargetPrompt] | TargetPromptBatch | None = None,
    *,
    layers: Layers = None,
    latents: Float[Tensor, "given source _"] | Sequence[Tensor] | None = None,
    target_layers: Layers = None,
    source_position: int = -1,
    source_model: StandardizedTransformer | None = None,
    mapping: Mapped | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "source layer vocab"]:
    """The next-token probabilities of a target prompt into which hidden states of source prompts are put.

    Patchscopes (Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of
    Language Models", section 3): the stream after layer l at position i of the source prompt S in the source
    model M is mapped by f and takes the place of the stream after layer l* at position i* of the target prompt T in the
    target model M*. All layers are rows of one batch. Where the model has a KV cache they have the positions from i* on alone,
    and go on from the keys and values of those before, if a check shows that this gives what whole prompts give: see the log of
    `nnatomy.methods.patched_rows`.

    Args:
        nn_model: the target model M*.
        source_prompts: what `trace` takes, or `Prompt`s.
        target_patch_prompts: T and i*, one for all sources or one each; `repeat_prompt()` by default.
        layers: l, one or several; all by default.
        latents: instead of source prompts their hidden states: one for each of `layers`, or for each layer of the model.
        target_layers: l*, one for all of `layers` or one each; the same as `layers` by default.
        source_position: i, counted in each source prompt: 0 is its first token, -1 its last.
        source_model: M, if it is not the target model.
        mapping: f, from the source's hidden states to the target's; a `torch.nn.Linear`, or any function.
        batch_size: how many patched prompts run at once.
        progress: show the progress.

    Returns:
        Probabilities, on the CPU.

    Raises:
        InputError: if prompts and layers do not fit each other, or hidden states do not fit the target model.
        LayerIndexError: for a layer that the model does not have.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import TargetPrompt, patchscope_lens
        >>> model = StandardizedTransformer("demo:llama")
        >>> target = TargetPrompt("The capital of Spain is", index_to_patch=3)
        >>> probs = patchscope_lens(model, ["The capital of Japan"], target)
        >>> model.tokenizer.decode(probs[0, 0].argmax())
        ' Tokyo'
    """
    _refuse_target(nn_model, "patchscope_lens")
    if (latents is None) == (source_prompts is None):
        raise InputError("Give source_prompts or latents: one of the two.")
    source = source_model or nn_model
    chosen = _indices(source, layers)
    given = None if latents is None else _stacked(latents)
    if given is None:
        given = _states(source, source_prompts, chosen, source_position)
    elif len(given) not in (len(chosen), source.num_layers):
        raise InputError(
            f"latents are of {counted(len(given), 'layer')}: give one for each of the {counted(len(chosen), 'layer')} asked "
            f"for, or for each of the model's {source.num_layers}."
        )
    elif len(given) != len(chosen):
        given = given[chosen]
    states = _mapped(given, mapping, nn_model)
    into = _written(nn_model, chosen, target_layers)
    count = states.shape[1]
    wanted = repeat_prompt() if target_patch_prompts is None else target_patch_prompts
    targets = TargetPromptBatch.auto(wanted, count)
    if len(targets) != count:
        raise InputError(
            f"{counted(count, 'source')} and {counted(len(targets), 'target prompt')}: give one for all, or one each."
        )
    inputs, columns = _prepared(nn_model, targets)
    rows = torch.cartesian_prod(torch.arange(len(chosen)), torch.arange(count))

    def put(i: Tensor, one: Tensor) -> None:
        _put(nn_model.layers_output, torch.where(i < 0, i, into[i]), columns[one], states[i, one])

    probs = PatchedRows(nn_model, inputs, columns, put).probs(rows, batch_size, progress)
    return probs.unflatten(0, (len(chosen), count)).transpose(0, 1)


@method
@torch.no_grad()
def patchscope_generate(
    nn_model: StandardizedTransformer,
    prompts: Any,
    target_patch_prompt: TargetPrompt,
    *,
    max_length: int = 50,
    layers: Layers = None,
    max_batch_size: int = 32,
    target_layers: Layers = None,
    source_position: int = -1,
    source_model: StandardizedTransformer | None = None,
    mapping: Mapped | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> dict[int, Int[Tensor, "source seq"]]:
    """What the model writes after a target prompt into which hidden states of source prompts are put.

    Arguments are those of `patchscope_lens`, but for:

    Args:
        max_length: how many tokens are generated at most.
        max_batch_size: how many patched prompts run at once.
        **kwargs: go to the model's `generate`.

    Returns:
        By each of `layers`, token ids of (source, seq) on the CPU: the target prompt and what follows. Rows that ended early
        are filled up with the padding token to the longest of their batch.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import TargetPrompt, patchscope_generate
        >>> model = StandardizedTransformer("demo:llama")
        >>> target = TargetPrompt("The capital of Spain", index_to_patch=-1)
        >>> found = patchscope_generate(model, "The capital of Japan", target, max_length=2, layers=[0])
        >>> model.tokenizer.decode(found[0][0])
        'The capital of Spain is Tokyo'
    """
    _refuse_target(nn_model, "patchscope_generate")
    source = source_model or nn_model
    chosen = _indices(source, layers)
    names = [layers] if isinstance(layers, int) else chosen if layers is None else list(layers)
    states = _mapped(_states(source, prompts, chosen, source_position), mapping, nn_model)
    into = _written(nn_model, chosen, target_layers)
    count = states.shape[1]
    inputs, columns = _prepared(nn_model, TargetPromptBatch.auto(target_patch_prompt, count))
    columns = columns % inputs["attention_mask"].shape[1]  # without a KV cache the prompt gets longer behind
    rows = torch.cartesian_prod(torch.arange(len(chosen)), torch.arange(count))
    found: dict[int, Tensor] = {}
    for i, one in _batches(rows, count * max(1, max_batch_size // count), progress):
        with nn_model.generate(**of_rows(inputs, one), max_new_tokens=max_length, **kwargs) as tracer:
            for step in tracer.iter[:]:
                if step and nn_model.input_size[1] == 1:
                    break  # the patched positions are in the KV cache
                _put(nn_model.layers_output, into[i], columns[one], states[i, one])
            tokens = tracer.result
        written = [names[layer] for layer in i[::count]]
        found.update(zip(written, tokens.cpu().chunk(len(written)), strict=True))
    return found


@method
@torch.no_grad()
def patch_object_attn_lens(
    nn_model: StandardizedTransformer,
    source_prompts: Any,
    target_prompts: Any,
    *,
    attn_idx_patch: int,
    num_patches: int = 5,
    batch_size: int = 64,
    progress: bool = False,
) -> Float[Tensor, "target layer vocab"]:
    """The predictions after target prompts in which the attention reads the source's last token at another's place.

    From each layer on, in `num_patches` layers, what the attention module is given at one position of the target prompt is
    replaced by what it is given, in the same layer, at the last token of the source prompt. Layers without attention are left.

    Args:
        source_prompts: what `trace` takes: one for all target prompts, or one each.
        target_prompts: what `trace` takes.
        attn_idx_patch: the position, counted in each target prompt: 0 is its first token, -1 its last. (Of an
            encoder-decoder in what its decoder reads, whose attention to itself it is.)
        num_patches: in how many layers, from each on.
        batch_size: how many patched prompts run at once.
        progress: show the progress.

    Returns:
        Next-token probabilities by the first layer that is patched, on the CPU.

    Raises:
        InputError: if there are several sources, and not one for each target.
        NotInThisModelError: if the model has no attention.
    """
    accessor = nn_model.attentions_input
    if not nn_model.attention_layers:
        accessor.module(0)  # says why there is none
    source = prepared(nn_model, source_prompts)
    columns = torch.cat(positions_from_end(source, -1))
    with nn_model.trace(**source, use_cache=False):
        states = {i: accessor[i][torch.arange(len(columns)), columns] for i in nn_model.attention_layers}
    inputs = prepared(nn_model, target_prompts)
    columns = torch.cat(positions_from_end(inputs, attn_idx_patch))
    count = len(columns)
    if any(len(state) not in (1, count) for state in states.values()):
        raise InputError(
            f"{counted(len(states[nn_model.attention_layers[0]]), 'source')} and {counted(count, 'target prompt')}: "
            "give one source for all, or one each."
        )
    rows = torch.cartesian_prod(torch.arange(nn_model.num_layers), torch.arange(count))

    def put(first: Tensor, one: Tensor) -> None:
        for layer, state in states.items():
            here = (first >= 0) & (first <= layer) & (layer < first + num_patches)
            at = torch.where(here, layer, -1)  # -1: nowhere
            _put(accessor, at, columns[one], state.expand(count, -1)[one])

    probs = PatchedRows(nn_model, inputs, columns, put).probs(rows, batch_size, progress)
    return probs.unflatten(0, (nn_model.num_layers, count)).transpose(0, 1)


def _refuse_target(model: StandardizedTransformer, name: str) -> None:
    refuse_encoder_decoder(
        model,
        f"{name} puts hidden states into a target prompt, which the encoder of {{}} reads, while layers_output is its decoder's. "
        "Take a target model without an encoder; this one may be the source (source_model=...).",
    )


def _stacked(latents: Any) -> Float[Tensor, "layer source _"]:
    each = latents if isinstance(latents, (list, tuple)) else [latents]
    if not all(isinstance(one, Tensor) for one in each) or (len(each) > 1 and len({one.shape for one in each}) > 1):
        raise InputError("latents are a tensor of (layer, source, hidden), or one of (source, hidden) for each layer.")
    stacked = latents if isinstance(latents, Tensor) else torch.stack(list(latents))
    if stacked.ndim != 3:
        raise InputError(f"latents are of (layer, source, hidden); got {tuple(stacked.shape)}.")
    return stacked


def _indices(model: StandardizedTransformer, layers: Layers) -> list[int]:
    """These layers, counted from the first."""
    every = range(model.num_layers)
    if layers is None:
        return list(every)
    chosen = [layers] if isinstance(layers, int) else list(layers)
    for layer in chosen:
        model.layers_output.module(layer)  # raises where there is none
    return [every[layer] for layer in chosen]


def _written(model: StandardizedTransformer, read: list[int], layers: Layers) -> Int[Tensor, " layer"]:
    """The layers that are written, for those that are read."""
    into = _indices(model, read if layers is None else layers)
    into = into * len(read) if len(into) == 1 else into
    if len(into) != len(read):
        raise InputError(
            f"{counted(len(read), 'layer')} to read and {len(into)} to write: give one target layer for all, or one each."
        )
    return torch.tensor(into)


def _states(
    model: StandardizedTransformer, prompts: Any, layers: list[int], position: int
) -> Float[Tensor, "layer source ..."]:
    inputs = model.prepare(plain(prompts))
    columns = torch.cat(positions_from_end(inputs, position))
    with model.trace(**inputs, use_cache=False):
        stream = model.layers_output[: max(layers) + 1]
    return torch.stack([stream[i][torch.arange(len(columns)), columns].to(model.device) for i in layers])


def _mapped(states: Tensor, mapping: Mapped | None, model: StandardizedTransformer) -> Tensor:
    states = states if mapping is None else mapping(states)
    if states.shape[-1] != model.hidden_size:
        raise InputError(
            f"The hidden states are {states.shape[-1]} wide and the target model's {model.hidden_size}: give a mapping from "
            "the one to the other, such as a torch.nn.Linear."
        )
    return states


def _prepared(
    model: StandardizedTransformer, targets: TargetPromptBatch
) -> tuple[dict[str, Any], Int[Tensor, " target"]]:
    """The model's arguments, and where each prompt's position stands, counted from the end."""
    inputs = prepared(model, targets.prompts)
    mask, index = inputs["attention_mask"].cpu(), targets.index_to_patch.tolist()
    return inputs, torch.cat([from_end(mask[i], [where], i) for i, where in enumerate(index)])


def _batches(rows: Int[Tensor, "row 2"], size: int, progress: bool) -> Iterator[Tensor]:
    for batch in shown(rows.split(size), "Patching", progress):
        yield batch.T


def _put(
    accessor: LayerAccessor,
    layers: Int[Tensor, " row"],
    columns: Int[Tensor, " row"],
    states: Float[Tensor, "row ..."],
) -> None:
    """Put each row's state at its position of its layer."""
    for layer in layers.unique().tolist():
        if layer < 0:
            continue
        hidden = accessor[layer].clone()
        copies = len(hidden) // len(layers)  # of each prompt, with beams
        rows = (layers == layer).repeat_interleave(copies).nonzero().flatten()
        hidden[rows, columns[rows // copies]] = states[rows // copies].to(hidden)
        accessor[layer] = hidden
