"""Collecting activations: the values at some points, of any number of prompts, into memory or a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import torch
from tqdm.auto import tqdm

from nnatomy.errors import InputError, counted
from nnatomy.methods.activation_store import ActivationStore, StoreWriter, fingerprint
from nnatomy.methods.activations import Activations
from nnatomy.methods.arguments import method, several
from nnatomy.methods.points import accessor_of
from nnatomy.methods.prompts import Prompt, plain
from nnatomy.methods.reading import Reader, Selection, Wanted
from nnatomy.methods.tokens import tokens_of
from nnatomy.names import TABLE
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.choice import check_kept_as
from nnatomy.standardized.positions import numbers

Points = str | Sequence[str] | Mapping[str, int | Sequence[int] | None]
Positions = str | int | Sequence[int] | Callable[[list[int]], Sequence[int]]

#: The names whose values are numbers of (batch, seq, ...).
NAMES = tuple(row.name for row in TABLE if row.part != "model" and row.axes[:2] == ("batch", "seq") and not row.integer)


@overload
def collect_activations(
    model: StandardizedTransformer,
    prompts: Iterable[Any],
    *,
    points: Points = ...,
    positions: Positions = ...,
    batch_size: int | None = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str = ...,
    folder: None = ...,
    prompts_per_shard: int = ...,
    progress: bool = ...,
) -> Activations: ...


@overload
def collect_activations(
    model: StandardizedTransformer,
    prompts: Iterable[Any],
    *,
    points: Points = ...,
    positions: Positions = ...,
    batch_size: int | None = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str = ...,
    folder: str | Path,
    prompts_per_shard: int = ...,
    progress: bool = ...,
    engine: Literal["ray"] | None = ...,
    workers: int = ...,
) -> ActivationStore: ...


@method
@torch.no_grad()
def collect_activations(
    model: StandardizedTransformer,
    prompts: Iterable[Any],
    *,
    points: Points = "layers_output",
    positions: Positions = "last",
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    folder: str | Path | None = None,
    prompts_per_shard: int = 1024,
    progress: bool = True,
    engine: Literal["ray"] | None = None,
    workers: int = 2,
) -> Activations | ActivationStore:
    """The values at some points, at some positions of many prompts.

    Prompts of similar length share a batch, all points are read in one forward pass, and it stops after the last layer
    that is wanted. Padding does not show: where it would (recurrent mixers, convolutions, some models' positions), which a
    few prompts of different lengths tell, only prompts of one length share a batch.

    Args:
        prompts: anything that can be gone through, of strings, `Prompt`s, chats, token ids, or mappings with
            `input_ids` (and perhaps `attention_mask`) or `text`, and of an encoder-decoder, whose encoder reads these, perhaps
            with `decoder_input_ids` (by default the token that the decoder begins with). Into memory, their token ids are all
            held at once; into a folder, those of one shard.
        points: names (all their layers), or by name the layers: `{"layers_output": [6], "mlps_output": None}`. Of an
            encoder-decoder those of its decoder, or those of its encoder (`encoder_layers_output`).
        positions: "last", "all", an index or several into each prompt's own tokens (negative: from its end; of a decoder's names
            those that the decoder reads), or a function from a prompt's token ids to such indices.
        batch_size: how many prompts a forward pass has; by default as many as have 1024 tokens, 40 of them padding,
            but one at least.
        dtype: convert to this; the model's own if None.
        device: where the values go, at once.
        folder: write them there, in shards, and return an `ActivationStore`. A run that was stopped, even killed, is
            taken up where it was by the same call: the shards that are done are kept, and their prompts only compared.
        prompts_per_shard: a shard is held in memory twice while it is written.
        progress: show a bar.
        engine: "ray" has shards read and written by workers in processes of their own, on this machine or at RAY_ADDRESS, by Ray
            Data (`nnatomy[cluster]`). The store is the same, bit for bit, on the same hardware with as many threads. All nodes
            have to see the folder; the token ids of all prompts pass through Ray's store.
        workers: how many; each has the model, and a GPU where the model is on one.

    Raises:
        InputError: if there are no prompts, one of them cannot be run, a position is none of a prompt's, a name has no
            values by position, names of a decoder and of its encoder are asked for together, or the folder was written by another
            model, with other settings or of other prompts.
        LayerIndexError, NotInThisModelError: for a point that the model does not have.
        OSError: if the folder cannot be written (a full disk); what was done stays, and the text says how much.
        RemoteError: if workers die again and again; what was done stays.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import collect_activations
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> prompts = ["The capital of France is", "Japan is in"]
        >>> acts = collect_activations(model, prompts, points={"layers_output": [3]}, progress=False)
        >>> acts["layers_output", 3].shape
        torch.Size([2, 96])
        >>> acts = collect_activations(model, prompts, positions="all", progress=False)
        >>> len(acts.tensors), acts["layers_output", 0].shape, acts.offsets.tolist()
        (6, torch.Size([8, 96]), [0, 5, 8])
    """
    several("prompts", prompts)
    check_kept_as(dtype, device)
    wanted = _wanted(model, points)
    if isinstance(prompts, (str, Prompt)):
        prompts = [prompts]
    if isinstance(prompts, Mapping):
        raise InputError("prompts is a mapping: give a list of prompts; one of them may be {'input_ids': ids}.")
    if engine not in (None, "ray") or (engine and folder is None):
        raise InputError(f"engine={engine!r}: there is 'ray', for a folder (folder=...), and None for this process.")
    total = len(prompts) if isinstance(prompts, Sized) else None
    of_encoder = wanted[0][0].of_encoder
    selections = (
        _selection(model, prompt, positions, of_encoder, f"prompts[{i}]")
        for i, prompt in enumerate(_each(model, prompts))
    )
    reader = Reader(model, wanted, batch_size, dtype, device)
    with tqdm(total=total, unit="prompt", disable=not progress) as bar:
        if folder is None:
            window = list(selections)
            if not window:
                raise InputError("There are no prompts to collect activations of.")
            return reader.read(window, bar.update)
        settings = {
            **fingerprint(model),
            "points": {accessor.name: layers for accessor, layers in wanted},
            "dtype": str(dtype),
            "prompts per shard": prompts_per_shard,
        }
        writer = StoreWriter(Path(folder), settings, one_row_each=positions == "last" or isinstance(positions, int))
        if engine is not None:
            from nnatomy.cluster.collecting import collect

            windows = iter(lambda: list(islice(selections, prompts_per_shard)), [])
            collect(writer, windows, reader, workers, bar.update)
        while window := list(islice(selections, prompts_per_shard)):
            contents = [(one.tokens.key, one.positions) for one in window]
            if writer.has_next(contents):
                bar.update(len(window))
            else:
                writer.add(reader.read(window, bar.update), contents)
        writer.finish()
        return ActivationStore(folder)


def _wanted(model: StandardizedTransformer, points: Points) -> Wanted:
    several("points", points)
    names = [points] if isinstance(points, str) else list(points)
    wanted = []
    for name in names:
        if not isinstance(name, str) or name.removeprefix("encoder_") not in NAMES or not hasattr(model, name):
            raise InputError(
                f"{name!r} is no name with values by position; there are {', '.join(NAMES)}, and of an encoder "
                "encoder_layers_output and its like."
            )
        accessor = accessor_of(model, name)
        layers = points[name] if isinstance(points, Mapping) else None
        if not len(accessor):
            accessor.module(0)  # raises
        if layers is None:
            layers = range(len(accessor))
        elif isinstance(layers, int):
            layers = [layers]
        for layer in layers:
            accessor.module(layer)  # raises
        wanted.append((accessor, [range(len(accessor))[layer] for layer in layers]))
    if len({accessor.of_encoder for accessor, _ in wanted}) > 1:
        raise InputError(
            f"points={points!r}: positions are those of what the encoder reads, or of what the decoder reads. Collect names of "
            "the one and of the other in two calls."
        )
    if not any(layers for _, layers in wanted):
        raise InputError(f"points={points!r} names no layer.")
    return wanted


def _each(model: StandardizedTransformer, prompts: Iterable[Any]) -> Iterator[Any]:
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, int):
            raise InputError(f"prompts[{i}] is {prompt}: for one prompt's token ids, give a list of it, [ids].")
        if isinstance(prompt, Mapping):
            names = [name for name in ("input_ids", "text") if name in prompt]
            if not names:
                raise InputError(f"prompts[{i}] has neither input_ids nor text; it has {', '.join(prompt)}.")
            beside = ["decoder_input_ids", "decoder_attention_mask"]
            # An image's pixels, and what says where they go. (Data sets have columns of other things.)
            images = any("pixel" in name for name in prompt)
            beside += [name for name in prompt if images and name != "labels" and model._prompts.reads(name)]
            beside += ["attention_mask"] if names[0] == "input_ids" else []
            given = {name: prompt[name] for name in beside if name in prompt}
            prompt = {"input_ids": plain(prompt[names[0]]), **given}
        yield prompt


def _selection(
    model: StandardizedTransformer, prompt: Any, positions: Positions, of_encoder: bool, name: str
) -> Selection:
    try:
        each = tokens_of(model, prompt, of_encoder) or []
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if len(each) != 1:
        raise InputError(f"{name} is several prompts: give each by itself.")
    tokens, read = each[0], each[0].read
    chosen = positions(read) if callable(positions) else positions
    if isinstance(chosen, str):
        if chosen not in ("last", "all"):
            raise InputError(f"positions={chosen!r}: give 'last', 'all', indices, or a function from ids to indices.")
        chosen = range(len(read)) if chosen == "all" else -1
    if hasattr(chosen, "__len__") and not len(chosen):
        raise InputError(f"positions: none of {name} was chosen; leave such prompts out.")
    chosen = numbers("positions", chosen)
    for at in chosen:
        if not -len(read) <= at < len(read):
            where = " in the decoder" if read is tokens.decoder else ""
            raise InputError(f"{name} has {counted(len(read), 'token')}{where}: there is no position {at}.")
    return Selection(tokens, [range(len(read))[at] for at in chosen])
