"""Prompts with an image, for tiny models of the image-text classes: as many image tokens as the model's vision side makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import zoo
from nnatomy.arch_configs import has_decoder, takes

BATCH, AFTER = 2, 6  # prompts, and tokens after the image
_PATCHES = {"pixel_values": (BATCH * 16, 768)}
_SQUARE = {"pixel_values": (BATCH * 16, 3, 16, 16)}
_TILES = {
    "pixel_values": (BATCH, 3, 3, 64, 64),
    "image_sizes": [[128, 64]] * BATCH,
}  # the whole, and two halves
_PLACES = {
    "pixel_values": (BATCH, 16, 768),
    "image_position_ids": [[[i % 4, i // 4] for i in range(16)]] * BATCH,
}
_PACKED = {"pixel_values": (1, 3, 16, 16 * 16 * BATCH), "target_sizes": [[4, 4]] * BATCH}
_INKLING2 = {"pixel_values": (BATCH * 4, 32, 32, 3), "image_grid_thw": [[1, 2, 2]] * BATCH}
_NO_TOKENS = {"tokens": 0}

#: What only that type is given: noise of a shape (a tuple), or the numbers (a list); how many tokens, where it does not say.
GIVEN: dict[str, dict[str, Any]] = {
    "blip": _NO_TOKENS,
    "deepseek_vl_hybrid": {"high_res_pixel_values": (BATCH, 3, 64, 64)},
    "diffusion_gemma": _PLACES | {"decoder_input_ids": [[*range(20, 29)]] * BATCH},  # else it draws them
    "fuyu": {"pixel_values": (BATCH, 16, 768), "tokens": 16},
    "gemma4": _PLACES,
    "gemma4_unified": {
        "pixel_values": (BATCH, 4, 3072),
        "image_position_ids": [[[0, 0], [1, 0], [0, 1], [1, 1]]] * BATCH,
    },
    "git": _NO_TOKENS,
    "granite4_vision": _TILES,
    "granite_docling": {"pixel_values": (BATCH, 1, 3, 64, 64), "pixel_attention_mask": [[True]] * BATCH},
    "idefics": {"pixel_values": (BATCH, 1, 3, 16, 16)} | _NO_TOKENS,
    "inkling2": _INKLING2,
    "inkling2_loop": _INKLING2,
    "inkling_mm_model": {"pixel_values": (BATCH * 4, 2, 4, 4, 3)},
    "instructblip": {"qformer_input_ids": [[5, 6, 7]] * BATCH},
    "instructblipvideo": {
        "pixel_values": (BATCH, 1, 3, 64, 64),
        "qformer_input_ids": [[5, 6, 7]] * BATCH,
        "tokens": 4,
    },
    "kimi_k25": _SQUARE,
    "kosmos-2": {"tokens": 4},
    "kosmos-2.5": {"flattened_patches": (BATCH, 7, 770), "tokens": 4},
    "lfm2_vl": {
        "pixel_values": (BATCH, 16, 768),
        "spatial_shapes": [[4, 4]] * BATCH,
        "pixel_attention_mask": [[1] * 16] * BATCH,
    },
    "llama4": {"tokens": 4},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "minicpm_ocr": _PACKED,
    "minicpmv4_6": _PACKED,
    "minicpmv4_7": _PACKED,
    "mllama": {
        "pixel_values": (BATCH, 1, 4, 3, 64, 64),
        "aspect_ratio_ids": [[1]] * BATCH,
        "aspect_ratio_mask": [[[1] * 4]] * BATCH,
        "tokens": 0,
    },
    "molmo2": {
        "pixel_values": (BATCH, 16, 768),
        "image_grids": [[2, 2, 0, 0]] * BATCH,
        "image_num_crops": [1] * BATCH,
        "image_token_pooling": [[4 * i + j for j in range(4)] for i in range(4 * BATCH)],
    },
    "nemotron_h_omni": _PATCHES | {"image_grid_hw": [[4, 4]] * BATCH},
    "paddleocr_vl": _SQUARE,
    "pix2struct": {"flattened_patches": (BATCH, 7, 14)} | _NO_TOKENS,
    "pp_formulanet": _NO_TOKENS,
    "t5gemma2": {"pixel_values": (BATCH, 3, 64, 64)},
    "udop": _NO_TOKENS,
    "video_llama_3": {"image_merge_sizes": [2] * BATCH},
    "vision-encoder-decoder": {"pixel_values": (BATCH, 3, 16, 16)} | _NO_TOKENS,
}
#: What `pixel_values` is called in VideoLlava and in Fuyu, in older releases.
FORMER_NAMES = ("pixel_values_images", "image_patches")
NOISE = ("pixel_values", "flattened_patches", "high_res_pixel_values", *FORMER_NAMES)
#: What computes something else with no mask than with one of ones, which a trace gives: other positions, UDOP's own padding.
WITH_MASK = frozenset(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "udop"))
#: Classes of image-text models that are given no image here, and why.
NOT_TRIED: dict[str, str] = {
    "EvollaForProteinText2Text": "it reads proteins",
    "Mistral4ForCausalLM": "it is the text model alone",
    "PI0ForConditionalGeneration": "it reads a robot's state and noise beside images, and gives actions",
}


def inputs(hf: nn.Module, model_type: str) -> dict[str, Tensor]:
    """Arguments of the model's forward: two prompts, each with an image of its own."""
    given = pixels(hf, model_type)
    count = GIVEN.get(model_type, {}).get("tokens")
    if count is None:
        features = pytree.tree_leaves(features_of(hf, given))
        count = sum(f.numel() for f in features) // features[0].shape[-1] // BATCH
    token = getattr(hf.config, "image_token_id", None) or getattr(hf.config, "image_token_index", 3)
    ids = zoo.ids(hf, seq=1 + count + AFTER)
    ids[:, 1 : 1 + count] = token
    ids[:, 0] = getattr(hf.config, "vision_start_token_id", None) or ids[:, 0]
    for name in ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask"):
        if takes(hf, name) and count:
            given[name] = (ids == token).int()
    if takes(hf, "image_attention_mask"):
        given["image_attention_mask"] = torch.ones(*ids.shape, 1)
    if takes(hf, "bbox"):
        given["bbox"] = torch.linspace(0, 1, 4).expand(*ids.shape, 4)
        given["attention_mask"] = torch.ones_like(ids)  # traces give one; with none UDOP reads its own padding
    if model_type in WITH_MASK:
        given["attention_mask"] = torch.ones_like(ids)
    if has_decoder(hf):
        given["decoder_input_ids"] = zoo.ids(hf, seed=1)
    reads_tokens = takes(hf, "input_ids") and not (has_decoder(hf) and hf.main_input_name != "input_ids")
    return {"input_ids": ids, **given} if reads_tokens else given


def features_of(hf: nn.Module, given: dict[str, Tensor]) -> Any:
    """What the text model gets of the images."""
    with torch.no_grad():
        out = next(m for m in hf.modules() if hasattr(m, "get_image_features")).get_image_features(**given)
    found = getattr(out, "pooler_output", out)
    return out.deepstack_features[0][1] if found is None else found


def former_name(hf: nn.Module) -> str | None:
    """What the model calls `pixel_values`, where an older release calls it something else."""
    whole = getattr(hf, "model", hf)
    return next((n for n in FORMER_NAMES if takes(whole, n) and not takes(whole, "pixel_values")), None)


def pixels(hf: nn.Module, model_type: str) -> dict[str, Tensor]:
    """Two images, of noise."""
    vision = getattr(hf.config, "vision_config", hf.config)
    draw = torch.Generator().manual_seed(0)
    size = getattr(vision, "image_size", None) or 32
    size = (size, size) if isinstance(size, int) else tuple(size)
    made: dict[str, Any] = {"pixel_values": (BATCH, 3, *size)}
    if takes(hf, "image_grid_thw"):
        times = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
        wide = 3 * times * vision.patch_size**2
        made = {"pixel_values": (16 * BATCH, wide), "image_grid_thw": [[1, 4, 4]] * BATCH}
    elif takes(hf, "pixel_attention_mask"):
        made = {"pixel_values": (BATCH, 1, 3, *size)}
    elif takes(hf, "image_sizes") and model_type not in ("llava",):
        made["image_sizes"] = [[*size]] * BATCH
    if not (takes(hf, "pixel_values") or former_name(hf)):
        del made["pixel_values"]
    made |= GIVEN.get(model_type, {})
    made.pop("tokens", None)
    if former := former_name(hf):
        made[former] = made.pop("pixel_values")
    given = {
        name: torch.tensor(value) if isinstance(value, list) else torch.randn(value, generator=draw)
        for name, value in made.items()
    }
    if "flattened_patches" in given:  # the first two of each are its row and column
        given["flattened_patches"].abs_()
    return given
