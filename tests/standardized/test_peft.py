"""Models in PEFT's wrappers: the standard names, steps and prompts are those of the model within."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import PLACES, build, prompt_ids
from encoder_decoders import build as encoder_decoder
from reference import edited, hooked, reads_what_hooks_see
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs.cache_name import cache_name
from nnatomy.errors import InputError, NotReachedError, ValidationError
from nnatomy.methods import logit_lens
from nnatomy.tracing import Traceable

# peft 0.21 asks transformers 5.23 whether gradient checkpointing is on by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "opt": {"target_modules": "all-linear"},
    "gemma2": {},
    "mixtral": {"target_modules": ["q_proj", "o_proj"]},
}
every_type = pytest.mark.parametrize("model_type", list(TARGETS))
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def config_of(model_type: str) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **TARGETS[model_type])


def lora(model_type: str) -> Any:
    """A model in a wrapper, whose adapter matters."""
    model = peft.get_peft_model(build(model_type), config_of(model_type)).eval()
    with torch.no_grad():
        assert not torch.allclose(model(prompt_ids()).logits, build(model_type)(prompt_ids()).logits, rtol=0.1)
    return model


def layers_of(model: Any, model_type: str) -> Any:
    return model.get_submodule("base_model.model." + PLACES[model_type][0])


@every_type
def test_the_accessors_read_what_hooks_see(model_type: str) -> None:
    wrapped = lora(model_type)
    model = StandardizedTransformer(wrapped)
    assert model.hf_model is wrapped
    attention, mlp = PLACES[model_type][1:]
    points = {}
    for i, layer in enumerate(layers_of(wrapped, model_type)):
        points["layers_input", i] = layer, "input"
        points["attentions_output", i] = layer.get_submodule(attention), "output"
        if mlp is not None:
            points["mlps_output", i] = layer.get_submodule(mlp), "output"
        points["layers_output", i] = layer, "output"
        assert model.layers[i].path == f"base_model.model.{PLACES[model_type][0]}.{i}"
    reads_what_hooks_see(model, prompt_ids(), points)


@every_type
def test_an_edit_is_what_a_hook_does(model_type: str) -> None:
    wrapped = lora(model_type)
    model, ids = StandardizedTransformer(wrapped), prompt_ids()
    layer = layers_of(wrapped, model_type)[1]
    expected = edited(lambda: wrapped(ids).logits, layer, "output", lambda out: -out)
    with torch.no_grad():
        with model.trace(ids) as tracer:
            model.layers_output[1] = -model.layers_output[1]
            logits = model.logits
            assert torch.equal(tracer.result.logits, logits)
        assert torch.equal(logits, expected)
        assert not torch.equal(logits, wrapped(ids).logits)

        def negate() -> None:
            model.layers_output[1] = -model.layers_output[1]

        assert torch.equal(model.edit(negate)(ids).logits, expected)
        with model.trace(ids):
            model.logits = 2 * model.logits
            assert torch.equal(model.logits, 2 * wrapped(ids).logits)


@every_type
def test_steps_are_calls_of_the_model_within(model_type: str) -> None:
    """`generate` of the wrapper calls the model within, never the wrapper."""
    wrapped = lora(model_type)
    model, ids = StandardizedTransformer(wrapped), prompt_ids()
    layer = layers_of(wrapped, model_type)[1]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    plain = wrapped.generate(**arguments)
    expected = edited(lambda: wrapped.generate(**arguments), layer, "output", lambda out: -out)
    assert not torch.equal(plain, expected)
    seen = []
    with torch.no_grad(), model.generate(ids, **GREEDY) as tracer:
        for _ in tracer.iter[:]:
            seen.append(model.input_ids)
            model.layers_output[1] = -model.layers_output[1]
            assert model.logits.shape[:2] == (2, 1)  # generate asks for the last position's alone
        assert torch.equal(tracer.result, expected)
    assert torch.equal(torch.cat(seen, 1), expected[:, :-1])


@every_type
def test_padding_and_the_other_blocks_never_show(model_type: str) -> None:
    """The wrapper's forward has no `position_ids` in its signature; the model within takes them."""
    model = StandardizedTransformer(lora(model_type))
    long, short = prompt_ids(1, 7)[0].tolist(), prompt_ids(1, 3, seed=1)[0].tolist()
    with torch.no_grad():
        with model.trace() as tracer:
            blocks = [
                tracer.invoke(prompt, lambda: (model.input_ids, model.layers_output[1], model.logits))
                for prompt in (long, short)
            ]
        with model.trace([long, short]):
            together = model.logits
        for row, (block, prompt) in enumerate(zip(blocks, (long, short), strict=True)):
            with model.trace(prompt):
                alone = model.input_ids, model.layers_output[1], model.logits
            for mine, other in zip(block.value, alone, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(together[row, -len(prompt) :], alone[2][0], rtol=1e-4, atol=1e-4)


@every_type
def test_the_parameters_of_the_adapter_get_gradients(model_type: str) -> None:
    wrapped, ids = lora(model_type), prompt_ids()
    trained = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    wrapped(ids).logits[0, -1].max().backward()
    expected = {name: value.grad.clone() for name, value in trained.items()}
    wrapped.zero_grad()
    model = StandardizedTransformer(wrapped)
    with model.trace(ids):
        model.logits[0, -1].max().backward()
    assert trained
    assert all("lora" in name and torch.equal(trained[name].grad, expected[name]) for name in trained)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())


@every_type
def test_the_head_is_that_of_the_model_with_its_adapter(model_type: str) -> None:
    model = StandardizedTransformer(lora(model_type))
    with torch.no_grad():
        with model.trace(prompt_ids()):
            last = model.layers_output[-1]
            logits = model.logits
        torch.testing.assert_close(model.project_on_vocab(last), logits, rtol=1e-4, atol=1e-4)
        lens = logit_lens(model, prompt_ids())
    torch.testing.assert_close(lens[:, -1], logits[:, -1].softmax(-1), rtol=1e-4, atol=1e-4)


def test_the_models_own_names_are_those_of_the_wrapper() -> None:
    wrapped = lora("llama")
    model, ids = StandardizedTransformer(wrapped), prompt_ids()
    with torch.no_grad(), model.trace(ids) as tracer:
        down = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.output
        inner = model.base_model.model.output
        outer = model.output
    q_proj = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        expected = hooked(wrapped, lambda: wrapped(ids), {0: (q_proj.lora_A["default"], "output")})
        assert torch.equal(down, expected[0])
        assert torch.equal(inner.logits, wrapped(ids).logits)
        assert torch.equal(outer.logits, inner.logits)
        with model.trace(ids) as tracer:
            cache = tracer.cache(["base_model.model.lm_head"])
        assert torch.equal(cache["base_model.model.lm_head"].output, wrapped(ids).logits)
    with model.scan(ids):
        assert model.layers_output[1].shape == (2, 9, 32)
    with pytest.raises(NotReachedError, match="does not call that module"):
        with model.generate(ids, **GREEDY):
            model.output


def test_adapters_are_switched_off_and_merged() -> None:
    wrapped, ids, base = lora("llama"), prompt_ids(), build("llama")
    torch.manual_seed(1)
    wrapped.add_adapter("second", config_of("llama"))
    wrapped.eval()
    model = StandardizedTransformer(wrapped)

    def read() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), model.trace(ids):
            return model.layers_output[1], model.logits

    def own(hf: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            result = hf(ids, output_hidden_states=True, **kwargs)
        return result.hidden_states[2], result.logits

    def same(one: Any, other: Any) -> bool:
        return all(torch.equal(*pair) for pair in zip(one, other, strict=True))

    first = own(wrapped)
    assert same(read(), first)
    with wrapped.disable_adapter():
        assert same(read(), own(base))
    wrapped.set_adapter("second")
    second = own(wrapped)
    assert same(read(), second)
    assert not torch.allclose(second[0], first[0])
    names = ["default", "second"]  # one for each prompt of the batch
    # peft takes back what this puts on the model only if the call returns.
    with torch.no_grad(), model.trace(ids, adapter_names=names, early_stop=False):
        mixed = model.layers_output[1], model.logits
    for mine, one, other in zip(mixed, first, second, strict=True):
        torch.testing.assert_close(mine, torch.stack([one[0], other[1]]))
    wrapped.merge_adapter()
    assert same(read(), own(wrapped))
    wrapped.unmerge_adapter()
    merged = wrapped.merge_and_unload()
    model = StandardizedTransformer(merged)
    assert same(read(), own(merged))
    torch.testing.assert_close(read()[1], second[1], rtol=1e-4, atol=1e-4)


def test_an_adapters_folder_over_its_base(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    trained, ids = peft.get_peft_model(base, config_of("llama")).eval(), prompt_ids()
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        expected = trained(ids).logits
    again = type(build("llama")).from_pretrained(tmp_path / "base")
    for model in (
        StandardizedTransformer(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")),
        StandardizedTransformer(tmp_path / "adapter"),  # transformers finds the base by the adapter's config
    ):
        with torch.no_grad(), model.trace(ids):
            model.layers_output[0]
            assert torch.equal(model.logits, expected)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
        peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, use_dora=True),
        peft.VeraConfig(task_type="CAUSAL_LM", init_weights=False),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters(config: Any) -> None:
    wrapped, ids = peft.get_peft_model(build("llama"), config).eval(), prompt_ids()
    model = StandardizedTransformer(wrapped)
    layer = layers_of(wrapped, "llama")[1]
    expected = edited(lambda: wrapped(ids).logits, layer, "output", lambda out: -out)
    with torch.no_grad(), model.trace(ids):
        model.layers_output[1] = -model.layers_output[1]
        assert torch.equal(model.logits, expected)


# peft has no position ids for soft prompts, and says so to each generation.
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_soft_prompt_has_positions_before_the_tokens(model_type: str, kind: Any) -> None:
    torch.manual_seed(0)
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped, ids = peft.get_peft_model(build(model_type), config).eval(), prompt_ids()
    model, layer = StandardizedTransformer(wrapped), layers_of_soft(wrapped, model_type)[1]
    with torch.no_grad():
        result = wrapped(ids, output_hidden_states=True)
        with model.trace(ids):
            embeddings = model.token_embeddings
            hidden = model.layers_output[1]
            logits = model.logits
        assert embeddings.shape[:2] == (2, 9)
        assert hidden.shape[:2] == (2, 4 + 9)
        assert torch.equal(hidden, result.hidden_states[2])
        assert torch.equal(logits, result.logits)
        with model.trace(ids):
            last = model.layers_output[-1]
            assert torch.allclose(model.project_on_vocab(last), model.logits, atol=1e-4)
        with pytest.raises(NotReachedError, match="called without input_ids; it was given .*inputs_embeds"):
            with model.trace(ids):
                model.input_ids
        expected = edited(lambda: by_hand(wrapped, ids), layer, "output", lambda out: -out)
        with model.generate(ids, **GREEDY, use_cache=False) as tracer:
            for step in tracer.iter[:]:
                model.layers_output[1] = -model.layers_output[1]
                assert model.layers_output[1].shape[1] == 13 + step
            assert torch.equal(tracer.result, expected)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_soft_prompt_that_is_put_before_every_new_token_is_refused(model_type: str) -> None:
    """PEFT does not find the KV cache by the name that Transformers gives it from 5.24 on."""
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped, ids = peft.get_peft_model(build(model_type), config).eval(), prompt_ids()
    for weight in wrapped.prompt_encoder.parameters():
        weight.data.normal_()
    model = StandardizedTransformer(wrapped)
    with torch.no_grad():
        plain = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
        if cache_name(wrapped.get_base_model()) == "past_key_values":
            assert torch.equal(model.generate(ids, **GREEDY).run(), by_hand(wrapped, ids))
            return
        assert not torch.equal(plain, by_hand(wrapped, ids))
        message = r"puts its soft prompt, of 4 positions, before every token .*: use_cache=False\."
        with pytest.raises(InputError, match=message):
            model.generate(ids, **GREEDY).run()
        seen = []
        with pytest.raises(InputError, match=message), model.generate(ids, **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                seen.append(model.layers_output[1])
        assert len(seen) == 1


def by_hand(wrapped: Any, ids: Tensor) -> Tensor:
    """What is generated greedily, each step a forward pass of all tokens."""
    for _ in range(GREEDY["max_new_tokens"]):
        ids = torch.cat([ids, wrapped(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def prefix_tuned(model_type: str) -> Any:
    """A model whose layers are given keys and values of 3 positions before the prompt's, which matter."""
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(build(model_type), config).eval()
    torch.nn.init.normal_(wrapped.prompt_encoder["default"].embedding.weight)
    with torch.no_grad():
        assert not torch.allclose(wrapped(prompt_ids()).logits, build(model_type)(prompt_ids()).logits, atol=0.5)
    return wrapped


# PEFT gives the prefix as `past_key_values`, of which Transformers 5.24 warns.
old_name = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")


@old_name
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_a_prefix_that_is_lost_in_a_generation_is_warned_of(model_type: str) -> None:
    """PEFT gives it beside the KV cache that Transformers makes from 5.24 on, which is the one that the model takes."""
    wrapped, ids = prefix_tuned(model_type), prompt_ids()
    model = StandardizedTransformer(wrapped)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain, expected = wrapped.generate(**given, **GREEDY), by_hand(wrapped, ids)
        if cache_name(wrapped.get_base_model()) == "past_key_values":
            assert torch.equal(plain, expected)
            assert torch.equal(model.generate(ids, **GREEDY).run(), expected)
            return
        assert not torch.equal(plain, expected)
        text = "is given two KV caches, as cache and as past_key_values, and makes no use of the second: a prefix .* has no effect"
        with pytest.warns(UserWarning, match=text) as caught:
            tokens = model.generate(ids, **GREEDY).run()
        assert torch.equal(tokens, plain)
        assert [one.filename for one in caught if "two KV caches" in str(one.message)] == [__file__]
        model(ids)  # a forward pass has it, and no warning


@old_name
def test_a_prefix_of_an_encoder_decoder_is_as_wide_as_its_heads() -> None:
    """PEFT takes a head to be hidden_size / num_heads wide, which those of T5 need not be: the model's own error."""
    given = {"input_ids": torch.tensor([[20, 21, 22]]), "decoder_input_ids": torch.tensor([[23, 24]])}
    for changes, width, error in (({}, None, RuntimeError), ({}, 64, None), ({"d_kv": 8}, None, None)):
        torch.manual_seed(0)
        hf = encoder_decoder("T5ForConditionalGeneration", **changes)
        config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, token_dim=width)
        wrapped = peft.get_peft_model(hf, config).eval()
        if error is not None:
            for call in (lambda: wrapped(**given), lambda: StandardizedTransformer(wrapped)):  # noqa: B023
                with pytest.raises(error, match="Sizes of tensors must match"):
                    call()
            continue
        torch.nn.init.normal_(wrapped.prompt_encoder["default"].embedding.weight)
        model = StandardizedTransformer(wrapped)
        with torch.no_grad():
            plain = wrapped(**given).logits
            assert not torch.allclose(plain, hf(**given).logits, atol=0.1)
            with model.trace(**given):
                hidden, logits = model.layers_output[1], model.logits
            assert torch.equal(logits, plain)
            seen = hooked(wrapped, lambda: wrapped(**given), {0: (hf.decoder.block[1], "output")})[0]  # noqa: B023
            assert torch.equal(hidden, seen)


@old_name
@pytest.mark.filterwarnings("ignore:.*is given two KV caches:UserWarning")
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "bloom", "gemma2"])
def test_a_prefix_is_keys_and_values_before_the_prompts(model_type: str) -> None:
    wrapped, ids = prefix_tuned(model_type), prompt_ids()
    model, layer = StandardizedTransformer(wrapped), layers_of_soft(wrapped, model_type)[1]
    assert model.validation["attention_probabilities", 1].status == "verified"
    assert model.validation["keys", 1].status == "verified"
    before = wrapped.get_prompt(1).layers[0].keys
    with torch.no_grad():
        plain = wrapped(ids).logits
        hidden = hooked(wrapped, lambda: wrapped(ids), {0: (layer, "output")})[0]
        with model.trace(ids):
            keys = model.keys[0]
            scores, pattern = model.attention_scores[1], model.attention_probabilities[1]
            seen, logits = model.layers_output[1], model.logits
        assert torch.equal(logits, plain)
        assert torch.equal(seen, hidden)
        assert torch.equal(keys[:, :, :3], before.expand_as(keys[:, :, :3]))
        assert pattern.shape == (2, 4, 9, 3 + 9)
        assert torch.allclose(scores.softmax(-1), pattern, atol=1e-6)
        assert pattern[..., :3].sum() > 1
        assert not pattern.triu(4).any()
        with model.trace(ids):
            model.attention_probabilities[1] = model.attention_probabilities[1].roll(1, 0)
            assert not torch.allclose(model.logits, plain, atol=1e-2)
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
        expected = edited(lambda: wrapped.generate(**arguments), layer, "output", lambda out: -out)
        with model.generate(ids, **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                model.layers_output[1] = -model.layers_output[1]
            assert torch.equal(tracer.result, expected)


@old_name
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom"])
def test_prompts_behind_a_prefix_are_padded_between_it_and_them(model_type: str) -> None:
    wrapped, ids = prefix_tuned(model_type), prompt_ids()
    model, layer = StandardizedTransformer(wrapped), layers_of_soft(wrapped, model_type)[1]
    vector = torch.linspace(-1, 1, model.hidden_size)

    def steered(hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :1] + vector, hidden[:, 1:]], 1)

    prompts = [ids[0].tolist(), ids[1, :6].tolist()]
    alone = [
        edited(lambda prompt=prompt: wrapped(torch.tensor([prompt])).logits, layer, "output", steered)
        for prompt in prompts
    ]
    with torch.no_grad():
        with model.trace(prompts):
            model.steer(1, vector, token_positions=0)
            logits = model.logits
        with model.trace() as tracer:
            with tracer.invoke(prompts[0]):
                first = model.logits
            with tracer.invoke(prompts[1]):
                second = model.logits
    assert torch.allclose(logits[1, -6:], alone[1][0], atol=1e-4)
    assert torch.allclose(logits[0], alone[0][0], atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(first, wrapped(torch.tensor(prompts[:1])).logits, atol=1e-4)
        assert torch.allclose(second, wrapped(torch.tensor(prompts[1:])).logits, atol=1e-4)


def layers_of_soft(wrapped: Any, model_type: str) -> Any:
    return wrapped.get_submodule("base_model." + PLACES[model_type][0])


def test_a_wrapper_that_calls_past_the_model_within_is_refused() -> None:
    """AdaLoRA's calls `model.forward`, which no hook sees."""
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=9)
    wrapped = peft.get_peft_model(build("llama"), config).eval()
    with pytest.raises(ValidationError, match="logits: LlamaForCausalLM is called 0 times, not once"):
        StandardizedTransformer(wrapped)
    StandardizedTransformer(wrapped.get_base_model())  # which has the adapter in it


def test_in_the_core_a_wrapper_is_a_module_like_any_other() -> None:
    wrapped, ids = lora("llama"), prompt_ids()
    view = Traceable(wrapped)
    with torch.no_grad(), view.trace(ids) as tracer:
        hidden = view.base_model.model.model.layers[2].output
        assert torch.equal(tracer.result.logits, wrapped(ids).logits)
    assert hidden.shape == (2, 9, 32)
