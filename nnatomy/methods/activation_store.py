"""Activations in a folder: shards in the safetensors format, and an index that says what they are."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from nnatomy.arch_configs import plain_tensors
from nnatomy.errors import InputError, check_folder
from nnatomy.methods.activations import Activations, Key, plot_norms
from nnatomy.paths import path_of, what_is_at
from nnatomy.standardized import StandardizedTransformer

_INDEX = "index.json"
#: How many values of each weight tell one model from another.
_SAMPLE = 4096


class ActivationStore(Dataset[Any]):
    """Activations that `collect_activations(..., folder=folder)` wrote, read when they are asked for.

    `store[i]` is prompt `i`: (row, hidden), or (hidden) where one position of each prompt was collected. It is a torch
    `Dataset`, so that a `DataLoader` can take it.

    Args:
        folder: where they are.
        name, layer: what `store[i]` is to be; by default a dict of everything, by (name, layer).
        incomplete: open it also if the collecting was stopped: what is there.

    Raises:
        InputError: if there are no activations, the collecting was stopped, or name and layer were not collected.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str | None = None,
        layer: int | None = None,
        *,
        incomplete: bool = False,
    ) -> None:
        self.folder = path_of(folder, "a folder that collect_activations wrote")
        self.index = _read_index(self.folder)
        if self.index is None:
            raise InputError(f"{folder}: there are no activations here (no {_INDEX}).{what_is_at(self.folder)}")
        self._ends = list(accumulate(shard["prompts"] for shard in self.index["shards"]))
        if not (self.index["complete"] or incomplete):
            raise InputError(
                f"{folder}: the collecting was stopped after {len(self)} prompts. Call collect_activations again as "
                "it was called to go on, or give incomplete=True for what is there."
            )
        collected = self.index["settings"]["points"]
        self.keys: list[Key] = [
            (point, i)
            for point, layers in collected.items()
            for i in layers
            if name in (None, point) and layer in (None, i)
        ]
        if not self.keys:
            raise InputError(f"{folder}: {name}[{layer}] was not collected; there are {_listed(collected)}.")
        self._one = name is not None and layer is not None

    def __len__(self) -> int:
        """How many prompts there are."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        shard = bisect_right(self._ends, index)
        first = index - (self._ends[shard] - self.index["shards"][shard]["prompts"])
        start, end = self._offsets[shard][first : first + 2].tolist()
        with safe_open(self._path(shard), "pt") as file:
            values = {key: file.get_slice(_text(key))[start:end] for key in self.keys}
        if self.index["one row each"]:
            values = {key: value[0] for key, value in values.items()}
        return values[self.keys[0]] if self._one else values

    def shards(self) -> Iterator[Activations]:
        """The activations shard by shard, in the order of the prompts."""
        for shard in range(len(self._ends)):
            with safe_open(self._path(shard), "pt") as file:
                tensors = {key: file.get_tensor(_text(key)) for key in self.keys}
                yield Activations(tensors, file.get_tensor("offsets"), file.get_tensor("token_ids"))

    def load(self) -> Activations:
        """All of them, in memory."""
        return Activations.joined(list(self.shards()))

    def plot(self) -> Any:
        """Curves (a plotly Figure) of the rows' norms by layer, as `Activations.plot`; read shard by shard."""
        shards = [part.norms() for part in self.shards()]
        return plot_norms({key: torch.cat([norms[key] for norms in shards]) for key in self.keys})

    @cached_property
    def _offsets(self) -> list[Tensor]:
        offsets = []
        for shard in range(len(self._ends)):
            with safe_open(self._path(shard), "pt") as file:
                offsets.append(file.get_tensor("offsets"))
        return offsets

    def _path(self, shard: int) -> Path:
        return self.folder / self.index["shards"][shard]["file"]


class StoreWriter:
    """Writes shards into a folder, one after the other; takes up what was begun there.

    A shard is in the index only when it is whole, and the index is replaced in one step. So whatever stops the writer,
    the folder holds the shards of the index and nothing of it is lost; what is not in the index is written anew.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, one_row_each: bool) -> None:
        self.folder = folder
        new: Any = {
            "format": 1,
            "settings": settings,
            "one row each": one_row_each,
            "complete": False,
            "shards": [],
        }
        self.index = _read_index(folder) or new
        self._next = 0
        for name, value in settings.items():
            there = self.index["settings"].get(name)
            if there != value:
                self._refuse(f"with other {name}: {there} there, {value} now")

    def has_next(self, contents: Sequence[tuple[list[int], list[int]]]) -> bool:
        """Whether the next shard is there; it is to be of these token ids and positions."""
        if self._next == len(self.index["shards"]):
            if self.index["complete"]:
                self._refuse("of fewer prompts")
            return False
        if self.index["shards"][self._next]["contents"] != _hash(contents):
            self._refuse(f"of other prompts or positions (in shard {self._next})")
        self._next += 1
        return True

    def add(self, activations: Activations, contents: Sequence[tuple[list[int], list[int]]]) -> None:
        """Write the next shard."""
        shard = described(self._next, contents)
        self._write(shard["file"], shard_bytes(activations))
        self.note([shard])

    def note(self, shards: Sequence[dict[str, Any]]) -> None:
        """Put the next shards, which are written, into the index."""
        index = {**self.index, "shards": [*self.index["shards"], *shards]}
        self._write(_INDEX, json.dumps(index, indent=1).encode())
        self.index = index
        self._next += len(shards)

    def finish(self) -> None:
        """There are no more."""
        if self._next == 0:
            raise InputError("There are no prompts to collect activations of.")
        if self._next < len(self.index["shards"]):
            self._refuse("of more prompts")
        if not self.index["complete"]:
            index = {**self.index, "complete": True}
            self._write(_INDEX, json.dumps(index, indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, data)
        except OSError as error:
            raise self.failed(error, name) from error

    def failed(self, error: OSError, name: str) -> OSError:
        """What to say of a file that could not be written."""
        done = sum(shard["prompts"] for shard in self.index["shards"])
        text = (
            f"{error.strerror or error}, writing {name}. The activations of the first {done} prompts are in "
            f"{self.folder}; the same call goes on from there"
        )
        return OSError(error.errno, text)

    def _refuse(self, why: str) -> None:
        raise InputError(f"{self.folder} has activations {why}. Give another folder, or delete this one.")


def described(number: int, contents: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """What the index tells of a shard of these token ids and positions."""
    return {"file": f"{number:06}.safetensors", "prompts": len(contents), "contents": _hash(contents)}


def shard_bytes(activations: Activations) -> bytes:
    """The file of a shard."""
    tensors = {_text(key): value.contiguous() for key, value in activations.tensors.items()}
    return save(tensors | {"offsets": activations.offsets, "token_ids": activations.token_ids})


def write_whole(path: Path, data: bytes, ending: str = "part") -> None:
    """Write a file so that at any moment, also after a crash, there is the old one or the whole new one.

    Args:
        ending: of the file that is written before it is put there: one of its own where several may write.
    """
    check_folder(path)
    part = path.with_name(f"{path.name}.{ending}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the folder's entry too
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def fingerprint(model: StandardizedTransformer) -> dict[str, Any]:
    """What tells a model from others: its class, its config, some values of every weight, and how many edits it has."""
    causal: Any = model.steps_of
    config = {
        name: value
        for name, value in causal.config.to_dict().items()
        if name not in ("transformers_version", "_name_or_path")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.hf_model.state_dict().items():
        digest.update(f"{name} {getattr(tensor, 'dtype', '')} {tuple(getattr(tensor, 'shape', ()))}".encode())
        whole = isinstance(tensor, Tensor) and tensor.device.type != "meta"
        for plain in plain_tensors(tensor) if whole else ():
            values = plain.detach().reshape(-1)
            sample = values[:: max(1, len(values) // _SAMPLE)].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return {"model": type(model.hf_model).__name__, "weights": digest.hexdigest(), "edits": len(model.edits)}


def _read_index(folder: Path) -> Any:
    path = folder / _INDEX
    return json.loads(path.read_text()) if path.exists() else None


def _hash(contents: Sequence[tuple[list[int], list[int]]]) -> str:
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _text(key: Key) -> str:
    return f"{key[0]}[{key[1]}]"


def _listed(points: dict[str, list[int]]) -> str:
    return ", ".join(f"{name}{layers}" for name, layers in points.items())
