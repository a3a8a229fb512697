"""Tiny random models that read images, each with its family's own processor over a tiny tokenizer."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import transformers
import zoo
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

WORDS = "what is this a ? the left right of user assistant :".split()
_CLIP: Any = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_SQUARE: Any = {"vision_config": {"image_size": 16, "patch_size": 4}}


def tokenizer(**special: str) -> Any:
    """One word a token; `special`: `image_token="<image>"` and the like."""
    texts = ["<unk>", "<s>", "</s>", "<pad>", *dict.fromkeys(special.values()), *WORDS]
    table = {text: i for i, text in enumerate(texts)}
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    backend = Tokenizer(WordLevel(table, unk_token="<unk>"))
    backend.pre_tokenizer = split
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special,
    )
    made.padding_side = "left"
    return made


def pil(model_type: str, **arguments: Any) -> Any:
    """The image processor of that type that needs no torchvision."""
    module = importlib.import_module(f"transformers.models.{model_type}.image_processing_pil_{model_type}")
    kind = next(
        value
        for name, value in vars(module).items()
        if name.endswith("ProcessorPil") and value.__module__ == module.__name__
    )
    return kind(**arguments)


def without_videos(processor_class: Any, images: Any, words: Any, **arguments: Any) -> Any:
    """A processor whose part for videos, which needs torchvision, is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        return processor_class(images, words, None, **arguments)


def with_ids(hf: nn.Module, processor: Any, **of_config: str) -> tuple[nn.Module, Any]:
    """The model, told the ids that the tokenizer gives to its special tokens."""
    for field, token in of_config.items():
        value = processor.tokenizer.convert_tokens_to_ids(token)
        for part in hf.modules():
            config = getattr(part, "config", None)
            if config is not None and hasattr(config, field):
                setattr(config, field, value)
    return hf, processor


def llava(class_name: str = "LlavaForConditionalGeneration", model_type: str = "llava") -> tuple[nn.Module, Any]:
    hf = zoo.build_class(class_name, model_type, **_SQUARE)
    images = pil("clip", size={"shortest_edge": 16}, crop_size=16)
    processor = transformers.LlavaProcessor(images, tokenizer(image_token="<image>"), **_CLIP)
    return with_ids(hf, processor, image_token_id="<image>", image_token_index="<image>")


def llava_next() -> tuple[nn.Module, Any]:
    hf = zoo.build_class(
        "LlavaNextForConditionalGeneration", "llava_next", **_SQUARE, image_grid_pinpoints=[[32, 16], [16, 32]]
    )
    images = pil("llava_next", size={"shortest_edge": 16}, crop_size=16, image_grid_pinpoints=[[32, 16], [16, 32]])
    processor = transformers.LlavaNextProcessor(images, tokenizer(image_token="<image>"), **_CLIP)
    return with_ids(hf, processor, image_token_id="<image>", image_token_index="<image>")


def paligemma() -> tuple[nn.Module, Any]:
    hf = zoo.build_class(
        "PaliGemmaForConditionalGeneration",
        "paligemma",
        vision_config={"image_size": 16, "patch_size": 4, "projection_dim": 32},
        projection_dim=32,
    )
    images = pil("siglip", size={"height": 16, "width": 16})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))
    return with_ids(hf, processor, image_token_id="<image>", image_token_index="<image>")


def gemma3() -> tuple[nn.Module, Any]:
    hf = zoo.build_class(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        vision_config={"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
    )
    images = pil("gemma3", size={"height": 16, "width": 16})
    words = tokenizer(image_token="<patch>", boi_token="<begin>", eoi_token="<end>")
    processor = transformers.Gemma3Processor(images, words, image_seq_length=4)
    return with_ids(
        hf,
        processor,
        image_token_id="<patch>",
        image_token_index="<patch>",
        boi_token_index="<begin>",
        eoi_token_index="<end>",
    )


def qwen(kind: str = "qwen2_vl", name: str = "Qwen2VL") -> tuple[nn.Module, Any]:
    hf = zoo.build_class(f"{name}ForConditionalGeneration", kind)
    vision = hf.config.vision_config
    patch = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    images = pil("qwen2_vl", **patch, min_pixels=1, max_pixels=100 * vision.patch_size**2)
    words = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )
    processor = without_videos(getattr(transformers, f"{name}Processor"), images, words)
    return with_ids(
        hf,
        processor,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
    )


def idefics3() -> tuple[nn.Module, Any]:
    hf = zoo.build_class("Idefics3ForConditionalGeneration", "idefics3", **_SQUARE, scale_factor=2)
    images = pil("idefics3", size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    words = tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        **{f"r{i}{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)},
    )
    processor = transformers.Idefics3Processor(images, words, image_seq_len=4)
    return with_ids(hf, processor, image_token_id="<image>")


def internvl() -> tuple[nn.Module, Any]:
    hf = zoo.build_class(
        "InternVLForConditionalGeneration",
        "internvl",
        vision_config={"image_size": [16, 16], "patch_size": [4, 4]},
        image_seq_length=4,
    )
    images = pil("got_ocr2", size={"height": 16, "width": 16}, crop_to_patches=False)
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    processor = without_videos(transformers.InternVLProcessor, images, words, image_seq_length=4)
    return with_ids(hf, processor, image_token_id="<IMG_CONTEXT>")


def aya_vision() -> tuple[nn.Module, Any]:
    hf = zoo.build_class("AyaVisionForConditionalGeneration", "aya_vision", **_SQUARE)
    images = pil("got_ocr2", size={"height": 16, "width": 16}, crop_to_patches=False)
    words = tokenizer(
        image_token="<image>",
        patch_token="<|IMG_PATCH|>",
        start="<|START_OF_IMG|>",
        end="<|END_OF_IMG|>",
        tile="TILE_GLOBAL",
    )
    processor = transformers.AyaVisionProcessor(images, words, patch_size=4, img_size=16, downsample_factor=2)
    return with_ids(hf, processor, image_token_id="<|IMG_PATCH|>", image_token_index="<|IMG_PATCH|>")


def glm4v() -> tuple[nn.Module, Any]:
    hf = zoo.build_class("Glm4vForConditionalGeneration", "glm4v")
    vision = hf.config.vision_config
    images = pil(
        "glm4v",
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size={"shortest_edge": 1, "longest_edge": 100 * vision.patch_size**2 * 2},
    )
    words = tokenizer(
        image_token="<|image|>", video_token="<|video|>", begin="<|begin_of_image|>", end="<|end_of_image|>"
    )
    processor = without_videos(transformers.Glm4vProcessor, images, words)
    return with_ids(
        hf, processor, image_token_id="<|image|>", video_token_id="<|video|>", image_start_token_id="<|begin_of_image|>"
    )


def deepseek_vl() -> tuple[nn.Module, Any]:
    hf = zoo.build_class("DeepseekVLForConditionalGeneration", "deepseek_vl", **_SQUARE)
    images = pil("deepseek_vl", size={"height": 16, "width": 16}, min_size=4)
    processor = transformers.DeepseekVLProcessor(
        images, tokenizer(image_token="<image_placeholder>"), num_image_tokens=16
    )
    return with_ids(hf, processor, image_token_id="<image_placeholder>")


FAMILIES = {
    "llava": llava,
    "vipllava": lambda: llava("VipLlavaForConditionalGeneration", "vipllava"),
    "llava_next": llava_next,
    "paligemma": paligemma,
    "gemma3": gemma3,
    "qwen2_vl": qwen,
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl", "Qwen2_5_VL"),
    "qwen3_vl": lambda: qwen("qwen3_vl", "Qwen3VL"),
    "idefics3": idefics3,
    "internvl": internvl,
    "aya_vision": aya_vision,
    "glm4v": glm4v,
    "deepseek_vl": deepseek_vl,
}
