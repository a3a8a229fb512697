"""What every result of a method is: numbers whose axes have names and labels. From these come its text, tables and files."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nnatomy.errors import InputError, MissingPackageError, a, a_kind
from nnatomy.methods.activation_store import write_whole
from nnatomy.methods.arguments import whole
from nnatomy.paths import file_of, path_of, what_is_at

#: The classes of results by their names, which files say.
KINDS: dict[str, type[Result]] = {}
Kind = TypeVar("Kind", bound="Result")
_KEY = "nnatomy.Result"
_LETTERS = 60
_EACH = frozenset(("prompt", "pair"))  # what effects are averaged over before they are ranked


class Axis(NamedTuple):
    """An axis of `effect`.

    Attributes:
        name: "layer", "head", "position", "prompt", ...
        labels: what is at each place: numbers, or texts.
        texts: a token at each position, or the like, beside its number.
    """

    name: str
    labels: Sequence[int | str]
    texts: Sequence[str] | None = None


class Result:
    """Numbers of a method, `effect`, with what their axes are.

    A class of results says its axes, and in `prompts`, `metric` and `unit` what it is of: titles are made of that.
    """

    #: What is ranked and plotted, in words, and its unit.
    quantity: ClassVar[str] = "effect"

    def __post_init__(self) -> None:
        for name in _fields(type(self)):  # values of a model at a server are brought here: they outlive the connection
            local = getattr(getattr(self, name), "local", None)
            if local is not None:
                object.__setattr__(self, name, local())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KINDS[cls.__name__] = cls

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those of `effect`, in their order."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What it is of, in one line."""
        return type(self).__name__

    @property
    def unit(self) -> str:
        """The unit of the metric, "" where it is not known."""
        return unit_of(str(getattr(self, "metric", "")))

    def plot(self) -> Any:
        """A plotly figure."""
        raise NotImplementedError

    def heading(self, title: str | None = None, which: int | None = None) -> str:
        """The title of its plot: what it is, its metric, and its prompts, long ones cut.

        Args:
            title: a title of the user's, which is taken as it is.
            which: the only prompt (or pair of prompts) that is plotted, by its place.
        """
        return headed(self.title, self._prompts_of(which)) if title is None else title

    def _prompts_of(self, which: int | None) -> Sequence[str]:
        """The prompts of one place on the axis of prompts or pairs; all of them where it is not known which these are."""
        prompts, first = list(getattr(self, "prompts", ())), self.axes[0]
        if which is None or first.name not in _EACH or len(prompts) % len(first.labels):
            return prompts
        size, at = len(prompts) // len(first.labels), which % len(first.labels)
        return prompts[size * at : size * (at + 1)]

    def _numbers(self) -> Tensor:
        """`effect`."""
        found: Tensor = getattr(self, "effect")  # noqa: B009
        return found

    def _ranked(self) -> Tensor:
        """What shows how strong each place is: of the same axes as `effect`."""
        return self._numbers()

    def top(self, k: int = 10) -> list[Any]:
        """The `k` places with the largest numbers, in either direction, on average over prompts: [("L5H1", 0.97), ...]."""
        whole(1)("k", k)
        values, axes = self._ranked().float(), list(self.axes)
        while axes and axes[0].name in _EACH:
            values, axes = values.nanmean(0), axes[1:]
        axes, values = heads_first(axes, values)
        flat = values.flatten()
        order = flat.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)[:k].tolist()
        names = list(product(*[range(len(axis.labels)) for axis in axes]))
        return [(place(axes, names[i]), float(flat[i])) for i in order if not flat[i].isnan()]

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each number of `effect`: its axes, and "effect".

        Raises MissingPackageError if pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MissingPackageError('Tables are made with pandas: pip install "nnatomy[tables]".') from None
        columns: dict[str, list[Any]] = {}
        places = list(product(*[range(len(axis.labels)) for axis in self.axes]))
        for number, axis in enumerate(self.axes):
            columns[axis.name] = [axis.labels[at[number]] for at in places]
            if axis.texts is not None:
                columns["token"] = [axis.texts[at[number]] for at in places]
        columns["effect"] = self._numbers().detach().flatten().tolist()
        return pandas.DataFrame(columns)

    def to_xarray(self) -> Any:
        """`effect` as an xarray.DataArray with its named axes. Raises MissingPackageError if xarray is not installed."""
        try:
            import xarray
        except ImportError:
            raise MissingPackageError('Named axes are made with xarray: pip install "nnatomy[tables]".') from None
        values = self._numbers().detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
        coordinates = {axis.name: list(axis.labels) for axis in self.axes}
        return xarray.DataArray(values.numpy(), coordinates, [axis.name for axis in self.axes], self.title)

    def __repr__(self) -> str:
        axes = ", ".join(f"{axis.name} {len(axis.labels)}" for axis in self.axes)
        lines = [f"{self.title}: ({axes})"]
        prompts = list(getattr(self, "prompts", ()))
        lines += [f"  {_cut(prompt)!r}" for prompt in prompts[:2]]
        if len(prompts) > 2:
            lines.append(f"  ... of {len(prompts)} prompts")
        lines += self._lines()
        unit = f" in {self.unit}" if self.unit else ""
        best = self.top(5)
        if best:
            lines.append(f"strongest {self.quantity}{unit}:")
            wide = max(len(" -> ".join(one[:-1])) for one in best)
            lines += [f"  {' -> '.join(one[:-1]):<{wide}}  {one[-1]:+.4g}" for one in best]
        return "\n".join(lines)

    def _lines(self) -> list[str]:
        """More about it."""
        ends = {name: getattr(self, name) for name in ("clean", "corrupted") if hasattr(self, name)}
        return (
            [f"  metric: {', '.join(f'{name} {float(one.mean()):.4g}' for name, one in ends.items())}"] if ends else []
        )

    def _figure(self) -> Any:
        try:
            return self.plot()
        except (MissingPackageError, InputError):  # without plotly; nothing is a share of nothing
            return None

    def _repr_html_(self) -> str:
        text, figure = f"<pre>{html.escape(repr(self))}</pre>", self._figure()
        return text if figure is None else text + str(figure._repr_html_())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """What a notebook shows: the figure as plotly hands it to notebooks, which draw it where there is no network, too."""
        figure = self._figure()
        drawn = {} if figure is None else figure._repr_mimebundle_() or {}
        return {"text/html": self._repr_html_(), **drawn, "text/plain": repr(self)}

    # Files.

    def _state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _fields(type(self))}

    @classmethod
    def _of_state(cls: type[Kind], state: Mapping[str, Any]) -> Kind:
        """Raises ValueError for another's state."""
        needed = {one.name for one in fields(cls) if one.default is MISSING}  # type: ignore[arg-type]
        if not needed <= state.keys() <= set(_fields(cls)):
            raise ValueError(f"it has {sorted(state)}")
        return cls(**state)

    def save(self, path: str | Path) -> None:
        """Write it to a file in the safetensors format, whose header says what it is. Nothing in it is code."""
        tensors: dict[str, Tensor] = {}
        about = {
            "class": type(self).__name__,
            "state": {name: _packed(one, tensors) for name, one in self._state().items()},
        }
        write_whole(path_of(path, "a file to write"), save(tensors, {_KEY: json.dumps(about)}))

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Read what `save` wrote. Raises InputError for a file of something else, or of another kind of result."""
        path = file_of(path, "a file that a result's save wrote")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})[_KEY])
                kind = KINDS[about["class"]]
                if not issubclass(kind, cls):
                    raise InputError(
                        f"{path} is {a(kind.__name__)}, not {a(cls.__name__)}: {kind.__name__}.load(path)."
                    )
                state = {name: _unpacked(one, file) for name, one in about["state"].items()}
            found = kind._of_state(state)
            shape = tuple(len(axis.labels) for axis in found.axes)
            if shape != tuple(found._numbers().shape):
                raise ValueError(f"its axes are {shape}")
        except FileNotFoundError:
            raise InputError(f"There is no file {path}.") from None
        except InputError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
            raise InputError(
                f"{path} is no file that a result's save wrote ({type(error).__name__}: {error}): give one of these."
                f"{what_is_at(path)}"
            ) from None
        return found


def place(axes: Sequence[Axis], at: Sequence[int]) -> str:
    """The name of a place: "L5H1", "L3 position 4 ' is'"."""
    words: list[str] = []
    for axis, i in zip(axes, at, strict=True):
        label = axis.labels[i]
        if axis.name == "layer":
            words.append(f"L{label}")
        elif axis.name == "head" and words and words[-1].startswith("L"):
            words[-1] += f"H{label}"
        elif isinstance(label, str):
            words.append(label)
        else:
            words.append(f"{axis.name} {label}" + ("" if axis.texts is None else f" {axis.texts[i]!r}"))
    return " ".join(words)


def heads_first(axes: Sequence[Axis], values: Tensor) -> tuple[list[Axis], Tensor]:
    """With the axis of heads behind that of layers, where there are both."""
    names = [axis.name for axis in axes]
    if "head" not in names or "layer" not in names:
        return list(axes), values
    order = [i for i, name in enumerate(names) if name != "head"]
    order.insert(order.index(names.index("layer")) + 1, names.index("head"))
    return [axes[i] for i in order], values.permute(order)


def headed(title: str, prompts: Sequence[str]) -> str:
    """A title with the prompts, long ones cut; of many the first two, and how many there are."""
    shown = " / ".join(repr(_cut(prompt)) for prompt in prompts[:2])
    more = f" ... of {len(prompts)} prompts" if len(prompts) > 2 else ""
    return f"{title}: {shown}{more}" if shown else title


def texts_of(model: Any, prompts: Any) -> tuple[str, ...]:
    """Prompts as texts, for titles: tokens are decoded, where there is a tokenizer."""
    return tuple(_texts(model, prompts))


def _texts(model: Any, prompts: Any) -> Iterator[str]:
    prompts = getattr(prompts, "prompt", prompts)
    if isinstance(prompts, str):
        yield prompts
    elif isinstance(prompts, Mapping):
        if prompts.get("input_ids") is not None:
            yield from _texts(model, _own(prompts["input_ids"], prompts.get("attention_mask")))
    elif isinstance(prompts, Tensor) and not prompts.is_floating_point():
        yield from _texts(model, prompts.tolist())
    elif isinstance(prompts, (list, tuple)) and prompts and all(isinstance(one, int) for one in prompts):
        tokenizer = getattr(model, "tokenizer", None)
        yield str(list(prompts)) if tokenizer is None else str(tokenizer.decode(list(prompts)))
    elif isinstance(prompts, (list, tuple)):
        for one in prompts:
            yield from _texts(model, one)


def _own(ids: Any, mask: Any) -> Any:
    """The tokens that are no padding."""
    if not (isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.ndim == 2 and mask.shape == ids.shape):
        return ids
    return [row[own.bool()].tolist() for row, own in zip(ids, mask.to(ids.device), strict=True)]


def name_of(metric: Any) -> str:
    """What a metric is called: "logit_difference", or the name of a function of the user's; "metric" if it has none."""
    name = str(getattr(metric, "name", None) or getattr(metric, "__name__", "metric"))
    return "metric" if name == "<lambda>" else name


def unit_of(metric: str) -> str:
    """ "logits" of a logit difference, "nats" of logarithms, "" of others."""
    return {"logit_difference": "logits", "log_probability": "nats", "kl_divergence": "nats"}.get(metric, "")


def _fields(kind: Any) -> list[str]:
    return [one.name for one in fields(kind)]


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS // 2].rstrip()} ... {text[-_LETTERS // 2 :].lstrip()}"


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().as_subclass(Tensor).cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, tuple):
        return {"tuple": [_packed(one, tensors) for one in value]}
    if isinstance(value, list):
        return [_packed(one, tensors) for one in value]
    if isinstance(value, Mapping):
        return {"dict": [[key, _packed(one, tensors)] for key, one in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"{a_kind(value, 'A')} cannot be written to a file: results hold numbers, texts and tensors.")


def _unpacked(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(one, file) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, of),) = value.items()
    if kind == "tensor":
        return file.get_tensor(of)
    if kind == "tuple":
        return tuple(_unpacked(one, file) for one in of)
    if kind == "dict":
        return {key: _unpacked(one, file) for key, one in of}
    raise ValueError(f"it has {a(kind)}")
