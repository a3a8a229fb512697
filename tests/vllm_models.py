"""Tiny models in folders, for the engine and for Transformers; engines that are loaded once; and what plain hooks see on them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from nnatomy import StandardizedTransformer

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
VOCAB = 97
#: Loaded before all others: groups of processes for experts are made by the first engine of a process, if it has any.
FIRST = "mixtral"
_BASE = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "intermediate_size": 96,
}  # fmt: skip
_GPT2 = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 2,
    "vocab_size": VOCAB,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_BASE, "num_key_value_heads": 1}
_WINDOW = {**_GQA, "head_dim": 32, "sliding_window": 4}
_MOE = {**_GQA, "num_experts_per_tok": 2}
#: By model type, the fields of its config. Multipliers, caps and windows are such that one that is left out shows.
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {**_GQA, "head_dim": 32},
    "qwen2": _GQA,
    "qwen3": {**_GQA, "head_dim": 32},
    "gemma2": {
        **_WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**_WINDOW, "query_pre_attn_scalar": 24},
    "gpt2": _GPT2,
    "opt": {
        **{key: value for key, value in _BASE.items() if key != "intermediate_size"}, "ffn_dim": 96, "word_embed_proj_dim": 64,
    },
    "gpt_neox": _BASE,
    "granite": {**_GQA, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.2},
    "mixtral": {**_MOE, "num_local_experts": 4},
    "qwen3_moe": {**_MOE, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32},
    "gpt_oss": {**_MOE, "num_local_experts": 4, "head_dim": 32, "sliding_window": 4, "intermediate_size": 64},
}  # fmt: skip


@cache
def folder(name: str) -> str:
    """A folder with a random model of that type."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **FIELDS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    model.float().save_pretrained(path)
    return path


@cache
def on_engine(name: str, **options: Any) -> Any:
    """That model on the engine."""
    if name != FIRST:
        on_engine(FIRST)
    settings = {"kv_cache_memory_bytes": 1 << 26, "max_model_len": 64, "dtype": "float32", **options}
    return StandardizedTransformer(folder(name), engine="vllm", **settings)


@cache
def in_transformers(name: str) -> Any:
    """That model as Transformers loads it, with none of this library."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(on_engine(name).engine.config):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder(name), dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Token ids, of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def hooked(module: Any, look: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """With a plain forward hook of torch's on a module: `look(args, kwargs, output)`."""
    handle = module.register_forward_hook(lambda _, args, kwargs, output: look(args, kwargs, output), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def plainly(model: Any, ids: list[list[int]], tokens: int = 1, **options: Any) -> list[list[int]]:
    """What the engine writes by itself, without this library."""
    engine = model.engine
    params = engine.vllm.SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, **options})
    given = [{"prompt_token_ids": one} for one in ids]
    return [list(output.outputs[0].token_ids) for output in engine.llm.generate(given, params, use_tqdm=False)]


def written(ids: list[int], tokens: int) -> list[int]:
    """What Transformers writes behind a prompt of the llama, the most probable token each time."""
    hf = in_transformers("llama")
    row = list(ids)
    with torch.no_grad():
        for _ in range(tokens):
            row.append(int(hf(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(ids) :]


def hidden_states(name: str, ids: list[int]) -> tuple[Tensor, ...]:
    """What Transformers itself says each layer is given; and in the place of the last, what the final norm gives."""
    with torch.no_grad():
        return in_transformers(name)(torch.tensor([ids]), output_hidden_states=True).hidden_states


def assert_near(one: Tensor, other: Tensor, off: float = 1e-4) -> None:
    """That two values are near, relative to the largest."""
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= off * float(other.abs().max())
