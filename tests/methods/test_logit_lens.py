"""The logit lens against the same computed with plain hooks."""

from __future__ import annotations

import pytest
import torch
from architectures import PLACES, TYPES, prompt_ids, shared
from reference import edited, hooked

from nnatomy import StandardizedTransformer
from nnatomy.methods import logit_lens


@pytest.mark.parametrize("model_type", TYPES)
def test_each_row_is_the_models_prediction_were_that_layer_its_last(model_type: str) -> None:
    """The naive way: put each layer's output in the last layer's place, by a plain hook."""
    hf = shared(model_type)
    ids = prompt_ids()
    layers = list(hf.get_submodule(PLACES[model_type][0]))
    hidden = hooked(hf, lambda: hf(ids), {i: (layer, "output") for i, layer in enumerate(layers)})
    probs = logit_lens(StandardizedTransformer(hf), ids)
    assert probs.shape == (2, len(layers), hf.config.vocab_size)
    for i in range(len(layers)):
        logits = edited(lambda: hf(ids), layers[-1], "output", lambda _, i=i: hidden[i]).logits  # type: ignore[misc]
        assert torch.allclose(probs[:, i], logits[:, -1].softmax(-1), rtol=1e-3, atol=1e-6), i
