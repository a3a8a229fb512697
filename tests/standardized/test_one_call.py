"""A name of a layer is the one call of its module: what several layers share, or a loop goes through, has no such name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build, prompt_ids
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError, ValidationError
from nnatomy.names import OF_LAYERS, ROWS

OF_ATTENTIONS = [name for name in OF_LAYERS if ROWS[name].part == "attentions" and ROWS[name].place != "layer"]


def calls_of(hf: Any, module: nn.Module, ids: Tensor) -> list[Tensor]:
    """What each call of a module gives, by a hook."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with torch.no_grad():
        hf(ids, use_cache=False)
    hook.remove()
    return seen


@pytest.mark.parametrize("validate", [True, False])
def test_an_attention_that_two_layers_share_is_none_of_theirs(validate: bool) -> None:
    hf = build("llama")
    hf.config.use_cache = False  # both would write into the cache's first layer
    hf.model.layers[2].self_attn = hf.model.layers[1].self_attn
    model, ids = StandardizedTransformer(hf, validate=validate), prompt_ids()
    why = (
        r"model\.layers\.1\.self_attn is the module of layers 1, 2, called for each: read its calls as "
        r"model\.layers\.1\.self_attn\.calls\[k\]\."
    )
    for name in (*OF_ATTENTIONS, "mixers_output"):
        for layer in (1, 2):
            with pytest.raises(NotInThisModelError, match=rf"{name}\[{layer}\]: this layer has none: {why}"):
                with model.trace(ids):
                    getattr(model, name)[layer]
    with torch.no_grad(), model.trace(ids):  # of the others they are there
        model.attention_probabilities[0]
        model.layers_output[2]
    expected = calls_of(hf, hf.model.layers[1].self_attn, ids)
    with torch.no_grad(), model.trace(ids, use_cache=False):
        found = [model.model.layers[1].self_attn.calls[k].output[0] for k in range(2)]
    assert all(map(torch.equal, found, expected))
    assert not torch.allclose(*found)


def test_layers_that_are_one_module_do_not_load() -> None:
    hf = build("llama")
    hf.config.use_cache = False
    hf.model.layers[1] = hf.model.layers[0]
    with pytest.raises(ValidationError, match=r"layers_output\[0\]: fires 2 times in a forward pass, not once"):
        StandardizedTransformer(hf)


def test_a_layer_gone_through_twice_does_not_load() -> None:
    hf = build("llama")
    layer = hf.model.layers[1]
    once = layer.forward

    def twice(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return once(hidden + layer.mlp(hidden), *args, **kwargs)

    layer.forward = twice
    with pytest.raises(ValidationError, match=r"mlps_output\[1\]: fires 2 times in a forward pass, not once"):
        StandardizedTransformer(hf)
