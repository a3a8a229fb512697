"""What is checked of prompts with images as of prompts with sound: against the model's own call and plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import hooked
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError


@dataclass
class Asked:
    """One prompt with something beside text, and the names of what is made of it.

    Attributes:
        inputs: what the family's processor makes of the prompt.
        media: the same as a trace is given it.
        features: which of the inputs is made of what is beside the text.
        layers, projector: where the encoder's layers are, and what projects what they give. No projector: no module's output is what
            enters the stream.
        names: of the encoder's layers, the projector's output and what enters the stream.
    """

    hf: Any
    model: StandardizedTransformer
    prompt: str
    inputs: dict[str, Any]
    media: dict[str, Any]
    features: str
    layers: str
    projector: str | None
    names: tuple[str, str, str]

    @property
    def positions(self) -> Tensor:
        """Those of the one image, or sound."""
        find = self.model.image_tokens if "images" in self.media else self.model.audio_tokens
        (one,) = find(self.prompt, **self.media)
        return one.positions

    def trace(self) -> Any:
        """Of the prompt with what is beside it."""
        return self.model.trace(self.prompt, **self.media)


def check_a_trace(asked: Asked) -> None:
    """Its values are what plain hooks see, bit for bit."""
    hf, model, inputs = asked.hf, asked.model, asked.inputs
    of_layers, of_projector, entering = asked.names
    layers = hf.get_submodule(asked.layers)
    points: dict[Any, Any] = {i: (layer, "output") for i, layer in enumerate(layers)}
    points |= {"stream": (model.layers[0].module, "input"), "last": (model.layers[-1].module, "output")}
    if asked.projector:
        points["projector"] = (hf.get_submodule(asked.projector), "output")
    with torch.no_grad():
        plain = hf(**inputs).logits
        other = hf(**{**inputs, asked.features: -inputs[asked.features]}).logits
        seen = hooked(hf, lambda: hf(**inputs), points)
        with asked.trace() as tracer:
            encoded = getattr(model, of_layers)[:]
            if asked.projector:
                given = getattr(model, of_projector)
            entered = getattr(model, entering)
            stream = model.layers_input[0]
            last = model.layers_output[-1]
            logits = model.logits
            tracer.result
    assert not torch.allclose(plain, other, atol=1e-3), "what is beside the text does not matter"
    assert torch.equal(logits, plain)
    assert torch.equal(stream, seen["stream"])
    assert torch.equal(last, seen["last"])
    assert len(encoded) == len(layers)
    assert all(torch.equal(value, seen[i]) for i, value in enumerate(encoded))
    assert len(entered) == len(asked.positions)
    if asked.projector:
        assert torch.equal(given, seen["projector"])
        return
    with (
        pytest.raises(NotInThisModelError, match=r"no module gives what stands in the stream at an? .*'s positions"),
        model.trace(**inputs),
    ):
        getattr(model, of_projector)


def check_a_batch(model: StandardizedTransformer, prompts: list[str], argument: str, items: list[Any]) -> None:
    """Its prompts are what they are alone."""
    with torch.no_grad():
        with model.trace(prompts, **{argument: items}):
            together = model.logits[:, -1]
        for i, (prompt, one) in enumerate(zip(prompts, items, strict=True)):
            with model.trace(prompt, **{argument: one}):
                alone = model.logits[0, -1]
            torch.testing.assert_close(together[i], alone, rtol=1e-3, atol=1e-3)


def check_what_is_assigned(asked: Asked, zeroed: Callable[[nn.Module], Tensor]) -> None:
    """It goes on in the model.

    Args:
        zeroed: the logits where that module gives zeros.
    """
    hf, model = asked.hf, asked.model
    of_layers, of_projector, entering = asked.names
    with torch.no_grad():
        plain = hf(**asked.inputs).logits
        for i, layer in enumerate(hf.get_submodule(asked.layers)):
            with asked.trace():
                named = getattr(model, of_layers)
                named[i] = 0 * named[i]
                logits = model.logits
            assert torch.equal(logits, zeroed(layer))
        if asked.projector:
            with asked.trace():
                setattr(model, of_projector, 0 * getattr(model, of_projector))
                logits = model.logits
            assert torch.equal(logits, zeroed(hf.get_submodule(asked.projector)))
        places = asked.positions
        with asked.trace():
            before = getattr(model, entering)
            plain_stream = model.layers_input[0][0, places]
        with asked.trace():
            new = torch.randn_like(getattr(model, entering))
            setattr(model, entering, new)
            stream = model.layers_input[0][0, places]
            logits = model.logits
        scale = plain_stream / before  # what some families multiply all embeddings by
        torch.testing.assert_close(stream, new * scale, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(logits, plain, atol=1e-3)


def check_generating(asked: Asked) -> None:
    """It gives the model's own tokens, and what is beside the text enters in its first step alone."""
    with torch.no_grad():
        plain = asked.hf.generate(**asked.inputs, max_new_tokens=3, do_sample=False, pad_token_id=3)
        with asked.model.generate(asked.prompt, **asked.media, max_new_tokens=3, do_sample=False) as tracer:
            counts = [len(getattr(asked.model, asked.names[2])) for _ in tracer.iter[:]]
            tokens = tracer.result
    assert torch.equal(tokens, plain)
    assert counts == [len(asked.positions), 0, 0]
