"""Which modules of a denoiser are its blocks, which of their outputs is the stream of the picture, and which of the text.

diffusers' own registry says it of the classes that it knows. Of others it is read off what their `forward` names its arguments, as
all of diffusers does, and off which of a block's outputs is the next one's argument. Validation proves both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module, ModuleList

from nnatomy.diffusion.accessors import At
from nnatomy.diffusion.modulation import KINDS, ModulationMode
from nnatomy.standardized.attention import AttentionMode

#: The names that diffusers gives to the arguments of a block.
IMAGE, TEXT = "hidden_states", "encoder_hidden_states"


@dataclass
class Call:
    """One call of a module, as recorded: what it was given, and gave.

    Attributes:
        given: (args, kwargs).
        names: of the arguments of its forward.
        step, number: in which step, and which call of the module in that.
        written: whether something that it gave was changed in place later.
    """

    module: Module
    given: tuple[tuple[Any, ...], dict[str, Any]]
    names: tuple[str, ...]
    step: int
    number: int
    output: Any = None
    written: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was given, by name."""
        args, kwargs = self.given
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    @property
    def outputs(self) -> tuple[Any, ...]:
        return tuple(self.output) if isinstance(self.output, (tuple, list)) else (self.output,)


@dataclass
class Layer:
    """A block of the denoiser.

    Attributes:
        image, text: which of its outputs is the stream of the picture, and of the text. None where there is none.
        image_argument, text_argument: which of its arguments.
        is_known: whether diffusers' registry has its class.
        attention: its attention within its stream, or of both streams jointly; or why it has none.
        cross: its attention to the text; or why it has none.
        text_first: whether the text's keys come before the picture's, where its attention is of both jointly.
    """

    module: Module
    call: Call
    image: int | None
    text: int | None
    image_argument: str
    text_argument: str | None
    is_known: bool
    attention: Module | str = "the block has none"
    cross: Module | str = "the block has none"
    text_first: bool | None = None

    @property
    def has_two(self) -> bool:
        """Whether it gives a stream of the picture and one of the text."""
        return self.text is not None

    @property
    def stream(self) -> Tensor:
        """What it was given of the picture."""
        return self.call.arguments[self.image_argument]

    @property
    def text_given(self) -> Any:
        """What it was given of the text."""
        return None if self.text_argument is None else self.call.arguments.get(self.text_argument)

    def gave(self, which: int | None) -> Any:
        """One of its outputs."""
        return None if which is None or which >= len(self.call.outputs) else self.call.outputs[which]


def is_attention(module: Module) -> bool:
    """Whether it is one of diffusers' attentions."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    return isinstance(module, (Attention, AttentionModuleMixin))


def find_blocks(denoiser: Module) -> list[Module]:
    """The modules that may be its blocks: of the classes in diffusers' registry, or else the outermost in lists with an attention."""
    known = [module for module in denoiser.modules() if _metadata(module) is not None]
    if known:
        inside = {child for block in known for child in block.modules() if child is not block}
        lists = [
            one for one in denoiser.modules() if isinstance(one, ModuleList) and any(block in known for block in one)
        ]
        beside = [block for one in lists for block in one]
        found = dict.fromkeys([*known, *beside])
        return [module for module in denoiser.modules() if module in found and module not in inside]
    lists = [one for one in denoiser.modules() if isinstance(one, ModuleList)]
    members = [block for one in lists for block in one if any(map(is_attention, block.modules()))]
    within = {child for block in members for child in block.modules() if child is not block}
    return [block for block in members if block not in within and not is_attention(block)]


def layers_of(calls: list[Call]) -> list[Layer]:
    """The blocks, in the order of their calls."""
    layers = []
    for i, call in enumerate(calls):
        known = _metadata(call.module)
        following = calls[i + 1] if i + 1 < len(calls) else None
        layers.append(_known(call, known) if known is not None else _inferred(call, following))
    for layer in layers:  # the last one of a class is followed by another, which may be given something else
        alike = next((one for one in layers if type(one.module) is type(layer.module) and one.image is not None), None)
        if layer.image is None and alike is not None:
            layer.image, layer.text = alike.image, alike.text
    return layers


def _metadata(module: Module) -> Any:
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    return TransformerBlockRegistry._registry.get(type(module))


def _known(call: Call, known: Any) -> Layer:
    image, text = known.hidden_states_argument_name, known.encoder_hidden_states_argument_name
    image = image if image in call.names else call.names[0]
    return Layer(
        call.module,
        call,
        known.return_hidden_states_index,
        known.return_encoder_hidden_states_index,
        image,
        text if text in call.names else None,
        True,
    )


def _inferred(call: Call, following: Call | None) -> Layer:
    image = IMAGE if IMAGE in call.names else call.names[0]
    text = TEXT if TEXT in call.names else None
    where: dict[str, int | None] = {image: None, TEXT: None}
    if len(call.outputs) == 1:
        where[image] = 0
    elif following is not None:
        for name in where:
            given = following.arguments.get(name)
            where[name] = next((i for i, one in enumerate(call.outputs) if given is not None and one is given), None)
    return Layer(call.module, call, where[image], where[TEXT] if text else None, image, text, False)


def stream_at(layer: Layer, which: str, end: str) -> At | str:
    """Where the picture's or the text's stream is, before or after a block."""
    if end == "input":
        name = layer.image_argument if which == "image" else layer.text_argument
        if name is None or not isinstance(layer.call.arguments.get(name), Tensor):
            return f"the block is given no {name}"
        return At(layer.module, "input", *argument(layer.call.names, name))
    place = layer.image if which == "image" else layer.text
    if not isinstance(layer.gave(place), Tensor):
        return f"the block gives none of the {'picture' if which == 'image' else 'text'}"
    assert place is not None
    put = partial(_with_output, place)
    return At(layer.module, "output", partial(_output, place), put, copies=layer.call.written)


def argument(names: tuple[str, ...], name: str) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]:
    """How an argument of a call is got from its (args, kwargs), and another put there."""
    place = names.index(name)

    def get(value: Any) -> Any:
        args, kwargs = value
        return kwargs[name] if name in kwargs else args[place]

    def put(value: Any, new: Any) -> Any:
        args, kwargs = value
        if name in kwargs:
            return args, {**kwargs, name: new}
        return (*args[:place], new, *args[place + 1 :]), kwargs

    return get, put


def _output(place: int, value: Any) -> Any:
    return value[place] if isinstance(value, (tuple, list)) else value


def _with_output(place: int, value: Any, new: Any) -> Any:
    return (*value[:place], new, *value[place + 1 :]) if isinstance(value, (tuple, list)) else new


def inside(module: Module, kind: str, taps: dict[Module, Any]) -> At:
    """Where a value inside an attention's call is. (All kinds of one attention share a tap.)"""
    tap = taps.setdefault(module, partial(AttentionMode, getattr(module, "heads", None)))
    return At(module, kind, tap=tap)


def modulations(layer: Layer, taps: dict[Module, Any]) -> list[At]:
    """Where the modulations of a block are, the picture's and the text's."""
    tap = taps.setdefault(layer.module, partial(ModulationMode, layer.stream.shape[-1]))
    return [At(layer.module, kind, tap=tap) for kind in KINDS]


def names_of(module: Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward."""
    return tuple(inspect.signature(module.forward).parameters)


def timestep_argument(denoiser: Module) -> str:
    """What a denoiser calls the timestep."""
    return next((name for name in ("timestep", "t") if name in names_of(denoiser)), "timestep")
