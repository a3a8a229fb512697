"""The calls of nnterp's README and tests, under our import, give what they give there: names, arguments and shapes."""

from __future__ import annotations

import functools

import pytest
import torch

from nnatomy import StandardizedTransformer
from nnatomy.methods import (
    Prompt,
    TargetPrompt,
    TargetPromptBatch,
    get_first_tokens,
    logit_lens,
    next_token_probs_unsqueeze,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    repeat_prompt,
    run_prompts,
)

NAMES = ["gpt2", "llama"]
loaded = functools.cache(lambda name: StandardizedTransformer(f"demo:{name}"))


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> StandardizedTransformer:
    return loaded(request.param)


def test_the_readme(model: StandardizedTransformer) -> None:
    layer_probs = logit_lens(model, ["The capital of France is"])
    assert layer_probs.shape == (1, model.num_layers, model.vocab_size)
    target = TargetPrompt("The capital of France is", index_to_patch=-1)
    patchscope_probs = patchscope_lens(
        model, source_prompts=["The capital of England is"], target_patch_prompts=target, layers=5
    )
    assert patchscope_probs.shape == (1, 1, model.vocab_size)
    prompts = [
        Prompt.from_strings(
            "The capital of France is", {"target": "Paris", "other": ["London", "Madrid"]}, model.tokenizer
        )
    ]
    results = run_prompts(model, prompts)
    assert {name: probs.shape for name, probs in results.items()} == {"target": (1, 1), "other": (1, 1)}
    assert float(results["target"]) > 0.9
    results = run_prompts(model, prompts, get_probs_func=logit_lens)
    assert results["target"].shape == (1, model.num_layers)


def test_lenses(model: StandardizedTransformer) -> None:
    every = (2, model.num_layers, model.vocab_size)
    prompts = ["Hello world", "Test prompt"]
    probs, inverse = logit_lens(model, prompts, return_inv_logits=True)
    assert probs.shape == inverse.shape == every
    assert logit_lens(model, "Hello world").shape == (1, *every[1:])
    assert patchscope_lens(model, prompts).shape == every
    assert patchscope_lens(model, prompts, repeat_prompt(words=["cat"])).shape == every
    assert patchscope_lens(model, "Hello world", TargetPrompt("The answer is ?", -1)).shape == (1, *every[1:])
    assert patchscope_lens(model, prompts, layers=[0, 2, model.num_layers - 1]).shape == (2, 3, every[2])
    batch = TargetPromptBatch.from_prompts(["Hello", "The answer is"], [-1, 0])
    assert patchscope_lens(model, source_prompts=prompts, target_patch_prompts=batch).shape == every
    latents = torch.randn(model.num_layers, 1, model.hidden_size)
    target = TargetPrompt("Test prompt", -1)
    found = patchscope_lens(model, source_prompts=None, target_patch_prompts=target, layers=[0, 1], latents=latents)
    assert found.shape == (1, 2, every[2])
    found = patch_object_attn_lens(
        model,
        source_prompts=["Hello world"],
        target_prompts=["Test prompt here"],
        attn_idx_patch=0,
        num_patches=1,
    )
    assert found.shape == (1, *every[1:])


def test_generation(model: StandardizedTransformer) -> None:
    target = TargetPrompt("Paris is located in", -1)
    result = patchscope_generate(
        model, prompts=["The capital of France"], target_patch_prompt=target, max_length=5, layers=[0, 1]
    )
    length = len(model.tokenizer(target.prompt)["input_ids"])
    assert list(result) == [0, 1]
    for tokens in result.values():
        assert tokens.shape[0] == 1
        assert length < tokens.shape[1] <= length + 5


def test_prompts(model: StandardizedTransformer) -> None:
    assert len(get_first_tokens(["Paris", "Rome"], model)) >= 2
    prompt = Prompt.from_strings("The quick brown fox", "jumps", model)
    assert list(prompt.target_tokens) == ["target"]
    prompt = Prompt.from_strings("x", {"greeting": "hello", "punctuation": ".", "greeting2": "hello"}, model)
    assert not prompt.has_no_collisions()
    assert prompt.has_no_collisions(ignore_targets="greeting")
    assert prompt.has_no_collisions(ignore_targets=["greeting", "punctuation"])
    probs = torch.rand(1, 3, model.vocab_size)
    assert prompt.get_target_probs(probs)["greeting"].shape == (1, 3)
    assert prompt.get_target_probs(probs, layer=1)["greeting"].shape == (1,)
    assert prompt.run(model, logit_lens)["greeting"].shape == (1, model.num_layers)
    assert next_token_probs_unsqueeze(model, "Hello world").shape == (1, 1, model.vocab_size)
    both = [
        prompt,
        Prompt.from_strings("y z", {"greeting": "a", "punctuation": "!", "greeting2": "b"}, model),
    ]
    found = run_prompts(model, both, batch_size=1, get_probs_func=lambda m, batch, **kwargs: logit_lens(m, batch))
    assert found["punctuation"].shape == (2, model.num_layers)
