"""The classes whose vision tower is one of timm's, which needs torchvision: they are built and load. `make videos` runs this."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from reference import hooked

from nnatomy import StandardizedTransformer

_TOWER: dict[str, Any] = {
    "architecture": "vit_pe_core_large_patch14_336",
    "model_args": {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "img_size": (28, 28),
        "global_pool": "",
        "use_post_transformer_norm": False,
        "init_values": 0.1,
        "ref_feat_shape": (2, 2),
    },
}
#: By class: its type, what of its config is not the default, and which name is compared on each layer.
CLASSES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "FastVlmForConditionalGeneration": ("fast_vlm", {}, True),
    "PerceptionLMForConditionalGeneration": ("perception_lm", {"vision_config": _TOWER}, True),
    "Gemma3nForConditionalGeneration": ("gemma3n", {}, False),  # whose stream has several copies: few names are there
}


@pytest.mark.parametrize("name", CLASSES)
def test_it_loads(name: str) -> None:
    kind, changes, has_stream = CLASSES[name]
    hf = zoo.build_class(name, kind, **changes)
    model = StandardizedTransformer(hf)
    assert model.validation.counts["failed"] == 0
    ids = zoo.ids(hf)
    layers = {i: (layer.module, "output") for i, layer in enumerate(model.layers)} if has_stream else {}
    with torch.no_grad():
        plain = hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        seen = hooked(hf, lambda: hf(input_ids=ids, attention_mask=torch.ones_like(ids)), layers)
        with model.trace(ids):
            read = model.layers_output[:] if has_stream else []
            assert torch.equal(model.logits, plain)
    assert all(torch.equal(value, seen[i]) for i, value in enumerate(read))
    assert model.validation.counts["verified"] >= (80 if has_stream else 1)
