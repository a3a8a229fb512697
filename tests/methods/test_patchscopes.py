"""Patchscopes against one pass a layer and prompt, with plain hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import PLACES, build, prompt_ids, shared
from reference import edited, hooked
from torch import Tensor
from zoo.build import ids as zoo_ids
from zoo.build import shared as zoo_shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError
from nnatomy.methods import (
    Prompt,
    TargetPrompt,
    TargetPromptBatch,
    it_repeat_prompt,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    repeat_prompt,
)

SOME = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "opt")
HYBRIDS = ("jamba", "lfm2")
OTHERS = (*HYBRIDS, "gemma4_text")  # which shares keys and values between layers
demo = functools.cache(lambda: StandardizedTransformer("demo:llama"))


@functools.cache
def wrapped(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(zoo_shared(model_type) if model_type in OTHERS else shared(model_type))


def layers_of(model_type: str) -> list[Any]:
    if model_type in OTHERS:
        return [view.module for view in wrapped(model_type).layers]
    return list(shared(model_type).get_submodule(PLACES[model_type][0]))


def ids(model_type: str, *lengths: int) -> list[list[int]]:
    """Prompts of these lengths."""
    if model_type in OTHERS:
        hf = wrapped(model_type).hf_model
        return [zoo_ids(hf, 1, n, seed=n + i)[0].tolist() for i, n in enumerate(lengths)]
    return [prompt_ids(1, n, seed=n + i)[0].tolist() for i, n in enumerate(lengths)]


def put(position: int, state: Tensor) -> Callable[[Tensor], Tensor]:
    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, position] = state
        return hidden

    return edit


def state_of(model_type: str, prompt: list[int], layer: int, position: int = -1) -> Tensor:
    hf, module = wrapped(model_type).hf_model, layers_of(model_type)[layer]
    return hooked(hf, lambda: hf(torch.tensor([prompt])), {0: (module, "output")})[0][0, position]


def naive(model_type: str, target: list[int], position: int, layer: int, state: Tensor) -> Tensor:
    hf, module = wrapped(model_type).hf_model, layers_of(model_type)[layer]
    call = lambda: hf(torch.tensor([target]))  # noqa: E731
    return edited(call, module, "output", put(position, state)).logits[0, -1].softmax(-1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("model_type", SOME + OTHERS)
@pytest.mark.parametrize("batch_size", [64, 4])
def test_all_layers_in_one_batch_are_as_one_pass_each(model_type: str, batch_size: int) -> None:
    """Sources and targets of several lengths, so that both are padded, and none of it shows. (In hybrids padding shows
    in Transformers' own forward.)"""
    model = wrapped(model_type)
    lengths = ((7, 7), (6, 6)) if model_type in HYBRIDS else ((5, 9), (8, 6))
    sources, texts = (ids(model_type, *each) for each in lengths)
    positions = [2, -3]
    target = TargetPromptBatch.from_prompts(texts, positions)
    found = patchscope_lens(model, sources, target, batch_size=batch_size)
    assert found.shape == (2, model.num_layers, model.vocab_size)
    for i, (source, text, position) in enumerate(zip(sources, texts, positions, strict=True)):
        for layer in range(model.num_layers):
            state = state_of(model_type, source, layer)
            close(found[i, layer], naive(model_type, text, position, layer, state))


@pytest.mark.parametrize("model_type", SOME)
def test_layers_and_positions_of_source_and_target_may_differ(model_type: str) -> None:
    model = wrapped(model_type)
    (source,), (text,) = ids(model_type, 7), ids(model_type, 6)
    target = TargetPrompt(text, 1)
    found = patchscope_lens(model, [source], target, layers=[-1, 0, 1], target_layers=[0, 2, -2], source_position=3)
    for i, (layer, into) in enumerate([(2, 0), (0, 2), (1, 1)]):
        state = state_of(model_type, source, layer, 3)
        close(found[0, i], naive(model_type, text, 1, into, state))
    every = patchscope_lens(model, [source], target, target_layers=0)
    for layer in range(model.num_layers):
        close(every[0, layer], naive(model_type, text, 1, 0, state_of(model_type, source, layer)))
    assert patchscope_lens(model, [source], target, layers=1).shape[1] == 1


def test_another_model_through_a_mapping() -> None:
    """From GPT-2, 32 wide, into a Llama of another width and another number of layers."""
    target_hf = build("llama", hidden_size=48, num_hidden_layers=4)
    target_model = StandardizedTransformer(target_hf)
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 48)
    (source,), (text,) = ids("gpt2", 5), ids("llama", 6)
    found = patchscope_lens(
        target_model,
        [source],
        TargetPrompt(text, 2),
        target_layers=[3, 1, 0],
        source_model=wrapped("gpt2"),
        mapping=linear,
    )
    for layer, into in enumerate([3, 1, 0]):
        with torch.no_grad():
            state = linear(state_of("gpt2", source, layer))
        call = lambda: target_hf(torch.tensor([text]))  # noqa: E731
        logits = edited(call, target_hf.model.layers[into], "output", put(2, state)).logits
        close(found[0, layer], logits[0, -1].softmax(-1))
    with pytest.raises(InputError, match=r"are 32 wide and the target model's 48: give a mapping"):
        patchscope_lens(target_model, [source], TargetPrompt(text, 2), source_model=wrapped("gpt2"))


def test_latents_are_by_the_layers_asked_for_or_by_all() -> None:
    model, (source,), (text,) = wrapped("llama"), ids("llama", 5), ids("llama", 6)
    target = TargetPrompt(text, 1)
    latents = torch.stack([state_of("llama", source, layer)[None] for layer in range(3)])
    expected = patchscope_lens(model, [source], target)
    close(patchscope_lens(model, None, target, latents=latents), expected)
    close(patchscope_lens(model, target_patch_prompts=target, latents=list(latents)), expected)
    close(patchscope_lens(model, None, target, layers=[0, 2], latents=latents), expected[:, [0, 2]])
    close(patchscope_lens(model, None, target, layers=[0, 2], latents=latents[[0, 2]]), expected[:, [0, 2]])
    with pytest.raises(InputError, match=r"latents are of 2 layers: give one for each of the 1 layer asked for"):
        patchscope_lens(model, None, target, layers=0, latents=latents[:2])


def test_what_does_not_fit_is_said() -> None:
    model, sources, target = wrapped("llama"), ids("llama", 5, 5), TargetPrompt([3, 4, 5], -1)
    with pytest.raises(InputError, match=r"one of the two"):
        patchscope_lens(model)
    with pytest.raises(InputError, match=r"one of the two"):
        patchscope_lens(model, sources, target, latents=torch.zeros(3, 2, 32))
    with pytest.raises(InputError, match=r"2 sources and 1 target prompt"):
        patchscope_lens(model, sources, [target])
    with pytest.raises(InputError, match=r"3 layers to read and 2 to write"):
        patchscope_lens(model, sources, target, target_layers=[0, 1])
    with pytest.raises(LayerIndexError, match=r"layers_output\[3\]: the model has 3 layers"):
        patchscope_lens(model, sources, target, layers=3)
    with pytest.raises(InputError) as error:
        patchscope_lens(model, sources, TargetPrompt([3, 4, 5], 3))
    assert str(error.value) == ("positions: prompt 0 has 3 tokens, at 0 to 2 (or -3 to -1); there is no position 3.")


@pytest.mark.parametrize("model_type", [*SOME, "lfm2"])
@pytest.mark.parametrize("max_batch_size", [32, 3])
def test_generation_goes_on_from_each_layer(model_type: str, max_batch_size: int) -> None:
    """Against greedy decoding by hand: the whole sequence anew for each token, the prompt's position patched."""
    lengths = (8, 8) if model_type == "lfm2" else (5, 8)  # where padding would show
    model, sources, (text,) = wrapped(model_type), ids(model_type, *lengths), ids(model_type, 6)
    found = patchscope_generate(
        model,
        sources,
        TargetPrompt(text, 2),
        max_length=4,
        layers=[0, -1],
        max_batch_size=max_batch_size,
        do_sample=False,
        eos_token_id=-1,
    )
    assert list(found) == [0, -1]
    for layer, tokens in found.items():
        for i, source in enumerate(sources):
            state, sequence = state_of(model_type, source, layer), list(text)
            for _ in range(4):
                sequence.append(int(naive(model_type, sequence, 2, layer, state).argmax()))
            assert tokens[i].tolist() == sequence


def test_beams_are_patched_as_their_prompt_is() -> None:
    model, sources = wrapped("llama"), ids("llama", 5, 8)
    target = TargetPrompt(ids("llama", 6)[0], 2)
    kwargs: dict[str, Any] = {"do_sample": False, "num_beams": 3, "eos_token_id": -1}
    both = patchscope_generate(model, sources, target, max_length=4, **kwargs)
    for i, source in enumerate(sources):
        alone = patchscope_generate(model, [source], target, max_length=4, max_batch_size=1, **kwargs)
        for layer in range(3):
            assert torch.equal(both[layer][i], alone[layer][0])


@pytest.mark.parametrize("model_type", SOME + OTHERS)
@pytest.mark.parametrize("sources", [1, 2])
def test_attention_reads_the_source(model_type: str, sources: int) -> None:
    model = wrapped(model_type)
    hf, layers = model.hf_model, layers_of(model_type)
    attentions = {i: model.attentions[i].module for i in model.attention_layers}
    assert len(layers) == model.num_layers
    lengths = ((7, 7), (6, 6)) if model_type in HYBRIDS else ((5, 9), (8, 6))
    given, texts = ids(model_type, *lengths[0])[:sources], ids(model_type, *lengths[1])
    found = patch_object_attn_lens(model, given, texts, attn_idx_patch=1, num_patches=2, batch_size=5)
    assert found.shape == (2, model.num_layers, model.vocab_size)
    for i, text in enumerate(texts):
        source = torch.tensor([given[i % sources]])
        states = hooked(hf, lambda s=source: hf(s), {j: (m, "input") for j, m in attentions.items()})  # type: ignore[misc]
        for first in range(model.num_layers):
            call = lambda t=text: hf(torch.tensor([t])).logits  # type: ignore[misc]  # noqa: E731
            for j in (first, first + 1):
                if j in attentions:
                    inner, edit = call, put(1, states[j][0, -1])
                    call = lambda c=inner, m=attentions[j], e=edit: edited(c, m, "input", e)  # type: ignore[misc]  # noqa: E731
            with torch.no_grad():
                close(found[i, first], call()[0, -1].softmax(-1))


def test_attention_lens_says_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"2 sources and 3 target prompts"):
        patch_object_attn_lens(wrapped("llama"), ids("llama", 4, 4), ids("llama", 5, 5, 5), attn_idx_patch=0)
    mamba = StandardizedTransformer(zoo_shared("mamba"))
    with pytest.raises(NotInThisModelError, match=r"attentions_input\[0\]: this layer has none"):
        patch_object_attn_lens(mamba, [[20, 21]], [[22, 23]], attn_idx_patch=0)


def test_a_country_put_into_another_prompt_is_asked_for_its_capital() -> None:
    """At the country's name in an early layer; at the last one nothing is left to ask it."""
    model, target = demo(), TargetPrompt("The capital of Spain is", 3)
    pairs = {"Japan": " Tokyo", "France": " Paris", "Egypt": " Cairo"}
    probs = patchscope_lens(model, [Prompt(f"The capital of {country}", {}) for country in pairs], target)
    early, late = probs[:, 0].argmax(-1), probs[:, -1].argmax(-1)
    assert [model.tokenizer.decode(i) for i in early] == list(pairs.values())
    assert [model.tokenizer.decode(i) for i in late] == [" Madrid"] * 3
    written = patchscope_generate(model, "The capital of Japan", target, max_length=2, layers=[0])
    assert model.tokenizer.decode(written[0][0, 5]) == " Tokyo"


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model, target = wrapped("llama"), TargetPrompt([3, 4, 5], -1)
    patchscope_lens(model, [[3, 4]], target)
    assert capsys.readouterr().err == ""
    patchscope_lens(model, [[3, 4]], target, progress=True)
    assert "Patching" in capsys.readouterr().err


def test_target_prompts() -> None:
    one, two = TargetPrompt("Hello", -1), TargetPrompt("World", 0)
    batch = TargetPromptBatch.from_target_prompts([one, two])
    assert list(batch) == [one, two]
    assert batch.index_to_patch.tolist() == [-1, 0]
    assert list(TargetPromptBatch.from_target_prompt(two, 3)) == [two] * 3
    assert list(TargetPromptBatch.from_prompts("Hello", -1)) == [one]
    assert list(TargetPromptBatch.from_prompts(["Hello", "World"], [-1, 0])) == [one, two]
    assert list(TargetPromptBatch.from_prompts(["Hello", "World"], torch.tensor([-1, 0]))) == [one, two]
    assert list(TargetPromptBatch.auto(two, 2)) == [two] * 2
    assert list(TargetPromptBatch.auto([one, two], 5)) == [one, two]
    assert list(TargetPromptBatch.auto("Hello", 2)) == [one] * 2
    assert TargetPromptBatch.auto(batch, 7) is batch
    with pytest.raises(InputError, match=r"index_to_patch has 3 positions for 2 prompts"):
        TargetPromptBatch.from_prompts(["a", "b"], [1, 2, 3])


def test_repeat_prompt() -> None:
    assert repeat_prompt() == TargetPrompt("king king\n1135 1135\nhello hello\n?", -1)
    assert repeat_prompt(["cat", "dog"], "->", " | ", "X", -2) == TargetPrompt("cat->cat | dog->dog | X", -2)


_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_repeat_prompt_as_a_chat(adds_bos: bool) -> None:
    """The text is as the model is to see it, once the tokenizer has put its first token before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")
    with pytest.raises(InputError, match=r"no chat template"):
        it_repeat_prompt(tokenizer)
    tokenizer.chat_template = _TEMPLATE
    text = repeat_prompt(["cat"]).prompt
    found = it_repeat_prompt(tokenizer, ["cat"])
    assert found.index_to_patch == -1
    assert found.prompt.startswith("<system>" if adds_bos else "<s><system>")
    assert found.prompt.count("<user>") == 2
    assert found.prompt.endswith(f"<user>{text}</s><assistant>{text}")
    assert tokenizer(found.prompt)["input_ids"].count(1) == 1
    open_ended = it_repeat_prompt(tokenizer, ["cat"], complete_prompt=False, add_user_instr=False).prompt
    assert open_ended.endswith(f"<user>{text}</s><assistant>")
    assert open_ended.count("<user>") == 1
    bare = it_repeat_prompt(tokenizer, ["cat"], add_user_instr=False, use_system_prompt=False).prompt
    assert "<system>" not in bare
    assert bare.count(text) == 2


def test_only_the_last_position_goes_through_the_head() -> None:
    model, rows = wrapped("llama"), []
    (source,) = ids("llama", 5)
    target = TargetPrompt(ids("llama", 7)[0], 2)
    handle = model.hf_model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0][..., 0].numel()))
    patchscope_lens(model, source, target)
    handle.remove()
    assert rows == [model.num_layers]


def test_an_edit_behind_the_last_layer_counts() -> None:
    model = wrapped("llama")
    (source,), (text,) = ids("llama", 5), ids("llama", 7)

    def shift() -> None:
        model.ln_final.output = model.ln_final.output.flip(-1)

    found = patchscope_lens(model.edit(shift), source, TargetPrompt(text, 2))
    norm = model.hf_model.model.norm
    handle = norm.register_forward_hook(lambda _, __, output: output.flip(-1))
    expected = [naive("llama", text, 2, layer, state_of("llama", source, layer)) for layer in range(model.num_layers)]
    handle.remove()
    close(found[0], torch.stack(expected))


def test_generating_without_a_cache_is_patched_in_every_step() -> None:
    model = demo()
    target = TargetPrompt("The capital of Spain", index_to_patch=-1)
    cached, anew = (
        patchscope_generate(model, ["The capital of Japan", "Oslo"], target, max_length=5, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert cached.keys() == anew.keys()
    assert all(torch.equal(cached[layer], anew[layer]) for layer in cached)
    assert len({tuple(tokens[0].tolist()) for tokens in cached.values()}) > 1
