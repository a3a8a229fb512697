"""Tiny random models that read videos, each with its family's own processor, whose part for videos needs torchvision."""

from __future__ import annotations

from typing import Any

import image_families
import numpy as np
import transformers
import zoo
from image_families import pil, tokenizer, with_ids
from torch import nn

_SQUARE: Any = {"vision_config": {"image_size": 16, "patch_size": 4}, "image_grid_pinpoints": [[32, 16], [16, 32]]}
_PINS = [[32, 16], [16, 32]]
_BOTH = {f"{kind}_token_{end}": f"<{kind}>" for kind in ("image", "video") for end in ("id", "index")}


def video(seed: int = 0, frames: int = 4) -> Any:
    """Noise."""
    return np.random.default_rng(seed).integers(0, 256, (frames, 64, 96, 3), dtype=np.uint8)


def _patches(hf: nn.Module) -> dict[str, int]:
    vision = hf.config.vision_config
    return {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }


def qwen(kind: str, name: str, videos: str = "Qwen2VL") -> tuple[nn.Module, Any]:
    hf = zoo.build_class(f"{name}ForConditionalGeneration", kind)
    patches = _patches(hf)
    most = 10_000 * patches["patch_size"] ** 2
    words = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )
    processor = getattr(transformers, f"{name}Processor")(
        pil("qwen2_vl", **patches, min_pixels=1, max_pixels=most),
        words,
        getattr(transformers, f"{videos}VideoProcessor")(
            **patches,
            size={"shortest_edge": 1, "longest_edge": most},
            do_sample_frames=False,
            cap_pixels_per_frame=False,
        ),
    )
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    return with_ids(
        hf, processor, **ids, vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"
    )


def glm4v() -> tuple[nn.Module, Any]:
    """Which stands its token for images at a video's patches."""
    hf = zoo.build_class("Glm4vForConditionalGeneration", "glm4v")
    patches: dict[str, Any] = _patches(hf)
    patches["size"] = {"shortest_edge": 1, "longest_edge": 2_000 * patches["patch_size"] ** 2}
    ends = {f"{end}_{kind}": f"<|{end}_of_{kind}|>" for end in ("begin", "end") for kind in ("image", "video")}
    words = tokenizer(image_token="<|image|>", video_token="<|video|>", **ends)
    videos = transformers.Glm4vVideoProcessor(**patches, do_sample_frames=False)
    processor = transformers.Glm4vProcessor(pil("glm4v", **patches), words, videos)
    return with_ids(
        hf, processor, image_token_id="<|image|>", video_token_id="<|video|>", image_start_token_id="<|begin_of_image|>"
    )


def llava_onevision() -> tuple[nn.Module, Any]:
    hf = zoo.build_class("LlavaOnevisionForConditionalGeneration", "llava_onevision", **_SQUARE)
    size = {"height": 16, "width": 16}
    processor = transformers.LlavaOnevisionProcessor(
        pil("llava_onevision", size=size, image_grid_pinpoints=_PINS),
        tokenizer(image_token="<image>", video_token="<video>"),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return with_ids(hf, processor, **_BOTH)


def llava_next_video() -> tuple[nn.Module, Any]:
    hf = zoo.build_class("LlavaNextVideoForConditionalGeneration", "llava_next_video", **_SQUARE)
    square = {"height": 16, "width": 16}
    processor = transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": 16}, crop_size=square),
        image_processor=pil("llava_next", size={"shortest_edge": 16}, crop_size=16, image_grid_pinpoints=_PINS),
        tokenizer=tokenizer(image_token="<image>", video_token="<video>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return with_ids(hf, processor, **_BOTH)


def internvl() -> tuple[nn.Module, Any]:
    """Which reads a video as so many images."""
    hf, images = image_families.internvl()
    videos = transformers.InternVLVideoProcessor(size={"height": 16, "width": 16})
    return hf, transformers.InternVLProcessor(images.image_processor, images.tokenizer, videos, image_seq_length=4)


FAMILIES = {
    "qwen2_vl": lambda: qwen("qwen2_vl", "Qwen2VL"),
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl", "Qwen2_5_VL"),
    "qwen3_vl": lambda: qwen("qwen3_vl", "Qwen3VL", "Qwen3VL"),
    "glm4v": glm4v,
    "llava_onevision": llava_onevision,
    "llava_next_video": llava_next_video,
    "internvl": internvl,
}
