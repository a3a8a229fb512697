"""What `run_with_cache` and `read` give: values under standard names, by layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnatomy.errors import CacheError, InputError, MissingPackageError, NoSuchModuleError, a_kind, check_folder, counted
from nnatomy.names import row_of
from nnatomy.paths import file_of, path_of, what_is_at
from nnatomy.standardized.choice import check_kept_as
from nnatomy.whole_number import whole_number
from nnatomy.words import By

#: A standard name and a layer.
Key = tuple[str, int]


@dataclass(frozen=True)
class CachedLayers:
    """One name in a cache: `found[5]` is the value on layer 5, `found[-1]` on the model's last; slices are lists.

    Attributes:
        name: the standard name.
        values: by layer, those that were read.
        count: how many layers the model has.
    """

    name: str
    values: Mapping[int, Tensor]
    count: int

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were read."""
        return tuple(self.values)

    @property
    def axes(self) -> tuple[str, ...]:
        """What the axes of each value are: ("batch", "seq", "hidden")."""
        return row_of(self.name).axes

    @overload
    def __getitem__(self, layer: int) -> Tensor: ...

    @overload
    def __getitem__(self, layer: slice) -> list[Tensor]: ...

    def __getitem__(self, layer: int | slice) -> Tensor | list[Tensor]:
        """Raises CacheError for a layer that was not read."""
        if isinstance(layer, slice):
            return [self[i] for i in range(self.count)[layer]]
        try:
            layer = whole_number(layer)
        except TypeError:
            raise CacheError(
                f"{self.name}[{layer!r}]: layers are counted, 0 to {self.count - 1}, or sliced. Several: "
                f"[cache.{self.name}[i] for i in (0, 1)]; all: cache.stack({self.name!r})."
            ) from None
        if (found := layer + self.count * (layer < 0)) not in self.values:
            held = ", ".join(map(str, self.values))
            raise CacheError(f"{self.name}[{layer}] is not in the cache: of that name it has layers {held}.")
        return self.values[found]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.values())

    def stack(self) -> Shaped[Tensor, "layer ..."]:
        """All layers that were read, in one tensor. Raises CacheError where their shapes differ."""
        if len(shapes := {tuple(value.shape) for value in self}) > 1:
            raise CacheError(f"{self.name}: the layers' values are of different shapes, {', '.join(map(str, shapes))}.")
        first = next(iter(self))
        return torch.stack([value.to(first.device) for value in self])

    def to_xarray(self) -> Any:
        """All layers that were read, as an xarray.DataArray with named axes: "layer", and those of the name (`axes`).

        Raises:
            CacheError: where the layers' shapes differ.
            MissingPackageError: if xarray is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise MissingPackageError('Named axes are made with xarray: pip install "nnatomy[tables]".') from None
        values = self.stack().detach()
        values = (values.local() if hasattr(values, "local") else values).cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
        names = ("layer", *self.axes)
        places = {name: range(size) for name, size in zip(names, values.shape, strict=True)}
        return xarray.DataArray(values.numpy(), {**places, "layer": list(self.layers)}, names, self.name)


class ActivationCache:
    """Values of one forward pass: `cache.layers_output[5]`, `cache["attention_probabilities", 5]`.

    What `model.run_with_cache` and `model.read` give. Iterating gives the names; `len` is how many there are.

    Args:
        values: by name and layer.
        counts: of each name, how many layers the model has.
        own: which of its prompt's own tokens each position of the values is, from 0 on; -1 for padding.
        lengths: how many tokens each prompt has. (Of an encoder-decoder both are the decoder's. None: nothing says it.)
        model: the view that was run.
        inputs: what its forward was given, where that can be run again.

    Attributes:
        tensors: all values, by name and layer.
    """

    def __init__(
        self,
        values: Mapping[Key, Tensor],
        counts: Mapping[str, int],
        own: Int[Tensor, "batch position"] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
        model: Any = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tensors = dict(values)
        self.model = model
        self.inputs = inputs
        self.lengths = lengths
        self._own = own
        self._counts = dict(counts)

    @overload
    def __getitem__(self, key: Key) -> Tensor: ...

    @overload
    def __getitem__(self, key: str) -> CachedLayers: ...

    def __getitem__(self, key: Key | str) -> Tensor | CachedLayers:
        """The value of (name, layer), or all layers of a name. Raises CacheError for what was not read."""
        if isinstance(key, tuple):
            if len(key) != 2:
                raise CacheError(
                    f"cache[{', '.join(map(repr, key))}]: give a name and a layer, cache['layers_output', 5]."
                )
            return self[key[0]][key[1]]
        if not isinstance(key, str) or key not in self._counts:
            raise CacheError(f"{key!r} is not in the cache, which has {', '.join(self)}: name it when it is filled.")
        values = {layer: value for (name, layer), value in self.tensors.items() if name == key}
        return CachedLayers(key, values, self._counts[key])

    def __getattr__(self, name: str) -> CachedLayers:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except CacheError as error:
            raise NoSuchModuleError(str(error)) from None

    def __contains__(self, key: object) -> bool:
        return key in self._counts or key in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __repr__(self) -> str:
        size = sum(value.nbytes for value in self.tensors.values())
        return f"<ActivationCache of {counted(len(self.tensors), 'value')}, {size / 1e6:,.1f} MB: {', '.join(self)}>"

    def stack(self, name: str) -> Shaped[Tensor, "layer ..."]:
        """All layers of that name in one tensor. Raises CacheError where their shapes differ, or there is no such name."""
        return self[name].stack()

    def to_xarray(self, name: str) -> Any:
        """All layers of that name as an xarray.DataArray with named axes: see `CachedLayers.to_xarray`."""
        return self[name].to_xarray()

    def columns(self, position: int) -> Int[Tensor, " batch"]:
        """Where that position of each prompt stands in the values; 0 is a prompt's first token, -1 its last.

        Raises:
            InputError: if it was not read of all prompts, or nothing says which tokens are padding.
        """
        try:
            position = whole_number(position)
        except TypeError:
            raise InputError(f"position={position!r}: it is a whole number.") from None
        if self._own is None or self.lengths is None:
            raise InputError("positions: nothing says which position of the cache is which token.")
        here = self._own == (position + self.lengths * (position < 0))[:, None]
        if not bool(here.any(1).all()):
            prompt = int((~here.any(1)).nonzero()[0])
            raise InputError(f"position={position}: of prompt {prompt} it is not in the cache.")
        return here.long().argmax(1)

    def logit_attribution(self, answer: Any, wrong: Any = None, *, by: By = "component", position: int = -1) -> Any:
        """What each part of the model adds to a logit, or to a difference of two: `direct_logit_attribution` of this pass.

        By "layer" it takes `layers_input` of the first layer and `layers_output` of all; by "component" the contributions
        of all layers, too. By "head", what a head's output becomes behind gates and norms is not in the cache, and the model is run
        on the prompts once more.

        Args:
            answer, wrong, by, position: as in `nnatomy.methods.direct_logit_attribution`.

        Returns:
            A LogitAttribution: parts, `effect` of (prompt, part), `logits` of (prompt).

        Raises:
            CacheError: if the cache has not the values that it takes; the text names them.
            InputError: for no token, a position that is not in the cache, or a cache without its model or prompts.
            NotInThisModelError: where what a layer's parts add to the stream is not known.
        """
        from nnatomy.methods.direct_logit_attribution import of_cache

        try:
            return of_cache(self, answer, wrong, by=by, position=position)
        except NoSuchModuleError as error:
            raise CacheError(str(error)) from None

    def save(self, path: str | Path) -> None:
        """Write all values, and the prompts' tokens, to a file in the safetensors format. (A graph of gradients is left behind.)

        Raises:
            OSError: if it cannot be written; a file that was there is then as it was.
        """
        tensors: dict[str, Tensor] = {}
        names: dict[Any, str] = {}
        same: dict[str, str] = {}
        inputs = {f"inputs.{name}": value for name, value in (self.inputs or {}).items()}
        plain = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
        again = self.inputs is not None and all(isinstance(one, bool | int | str | None) for one in plain.values())
        beside = {"own": self._own, "lengths": self.lengths, **(inputs if again else {})}
        for name, value in [*((f"{n}[{i}]", v) for (n, i), v in self.tensors.items()), *beside.items()]:
            if isinstance(value, Tensor):
                if hasattr(value, "local"):  # one at a server, which has no memory here
                    memory: Any = id(value)
                    value = value.local().contiguous()
                else:
                    memory = value.device, value.data_ptr(), value.shape, value.stride(), value.dtype
                if value.numel() and (first := names.setdefault(memory, name)) != name:
                    same[name] = first  # a layer's input is what the one before gave
                    continue
                whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
                tensors[name] = value.detach() if whole else value.detach().clone(memory_format=torch.contiguous_format)
        about = {"counts": self._counts, "same": same, "inputs": plain if again else None}
        path = path_of(path, "a file to write")
        check_folder(path)
        part = path.with_name(f"{path.name}.part")
        try:
            with part.open("wb"):  # an OSError, and not another library's, where it cannot be written
                pass
            save_file(tensors, part, {"nnatomy": json.dumps(about)})
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path, model: Any = None, *, device: torch.device | str = "cpu") -> ActivationCache:
        """Read what `save` wrote.

        Args:
            model: the view that was run, for `logit_attribution`. It must have as many layers, as wide; its weights are not compared.
            device: where the values go.

        Raises:
            InputError: if it is no file of `save`'s, or of another model's values.
            OSError: if it cannot be read.
        """
        from nnatomy.standardized.transformer import StandardizedTransformer

        check_kept_as(None, device)
        if torch.device(device).type == "meta":
            raise InputError("device='meta': a file is read onto a device that holds values, such as 'cpu'.")
        if model is not None and not isinstance(model, StandardizedTransformer):
            raise InputError(f"model is {a_kind(model)}: give the StandardizedTransformer that was run.")
        path = file_of(path, "a file that ActivationCache.save wrote")
        try:
            opened = safe_open(path, "pt", device=str(device))
        except SafetensorError as error:
            raise InputError(f"{path} was not written by ActivationCache.save: {error}.{what_is_at(path)}") from None
        with opened as file:
            about = json.loads((file.metadata() or {}).get("nnatomy", "{}"))
            if "counts" not in about:
                raise InputError(f"{path} was not written by ActivationCache.save.{what_is_at(path)}")
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found |= {name: found[first] for name, first in about["same"].items()}
        inputs = {name: found.pop(name) for name in [*found] if name.startswith("inputs.")} | (about["inputs"] or {})
        own, lengths = found.pop("own", None), found.pop("lengths", None)
        parts = {(name, int(layer)): value for key, value in found.items() for name, layer in [key[:-1].split("[")]}
        values = {key: parts[key] for name in about["counts"] for key in sorted(parts) if key[0] == name}
        if model is not None:
            _check_same(path, values, about["counts"], model)
        given = None if about["inputs"] is None else {name.removeprefix("inputs."): one for name, one in inputs.items()}
        return ActivationCache(values, about["counts"], own, lengths, model, given)


def _check_same(path: Path, values: Mapping[Key, Tensor], counts: Mapping[str, int], model: Any) -> None:
    """Raise InputError if another model's values lie there: of more or fewer layers, or of another width."""
    for (name, _), value in values.items():
        ours = len(getattr(model, name, ()))
        width = value.shape[-1] if name in ("layers_input", "layers_output") else model.hidden_size
        if (ours, model.hidden_size) != (counts[name], width):
            raise InputError(
                f"{path} has {name} of a model of {counted(counts[name], 'layer')} and width {width}, and the model given has "
                f"{counted(ours, 'layer')} and width {model.hidden_size}: give the one that was run."
            )
