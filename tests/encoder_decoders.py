"""Tiny encoder-decoders, and what they are given."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import zoo
from torch import Tensor, nn


def build(name: str, **changes: Any) -> nn.Module:
    if name.startswith("Whisper"):
        changes |= {"num_mel_bins": 8, "max_source_positions": 12}
    return zoo.build_class(name, getattr(transformers, name).config_class.model_type, **changes)


def inputs_of(hf: nn.Module) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": zoo.ids(hf, seq=6, seed=1)}
    if hf.main_input_name == "input_ids":
        return {"input_ids": zoo.ids(hf, seq=9), **decoder}
    return {"input_features": torch.randn((2, 8, 24), generator=torch.Generator().manual_seed(0)), **decoder}
