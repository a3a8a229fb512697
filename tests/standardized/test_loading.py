"""Loading: what passes through, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, prompt_ids, shared
from transformers import LlamaForCausalLM

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LoadError


def test_arguments_go_to_from_pretrained(tmp_path: Path) -> None:
    shared("llama").save_pretrained(tmp_path)
    model = StandardizedTransformer(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu", trust_remote_code=False
    )
    assert model.hf_model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.device == torch.device("cpu")
    with model.trace([3, 4]):
        assert model.layers_output[0].dtype == torch.bfloat16


OFFLOADED = {
    "model.embed_tokens": "disk",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, OFFLOADED])
def test_a_device_map_changes_no_value(device_map: Any, tmp_path: Path) -> None:
    """Also where accelerate keeps weights on disk, and on the meta device between two passes."""
    shared("llama").save_pretrained(tmp_path / "model")
    whole = StandardizedTransformer(tmp_path / "model")
    mapped = StandardizedTransformer(tmp_path / "model", device_map=device_map, offload_folder=tmp_path)
    if device_map is OFFLOADED:
        assert mapped.hf_model.lm_head.weight.is_meta
    values = []
    for model in (whole, mapped):
        assert model.device == torch.device("cpu")
        with torch.no_grad(), model.trace([[3, 4, 5], [6, 7]]):
            attention = model.attention_probabilities[0]
            model.layers_output[1] = 2 * model.layers_output[1]
            last = model.layers_output[2]
            values.append([attention, last, model.logits])
        values[-1].append(model.project_on_vocab(last))
    for one, other in zip(*values, strict=True):
        assert torch.equal(one, other)


def test_what_has_not_been_validated_says_so() -> None:
    assert "not validated" in repr(StandardizedTransformer(shared("gpt2"), validate=False))
    assert "not validated" not in repr(StandardizedTransformer(shared("gpt2")))


def test_a_loaded_model_stays_the_users_own() -> None:
    hf = shared("gpt2")
    before = dict(hf.__dict__)
    model = StandardizedTransformer(hf)
    assert model.hf_model is hf
    assert hf.__dict__.keys() == before.keys()
    with pytest.raises(InputError, match="dtype: arguments of from_pretrained, but the model is already loaded"):
        StandardizedTransformer(hf, dtype=torch.float16)


def test_training_mode_is_left_as_it_was(tmp_path: Path) -> None:
    shared("gpt2").save_pretrained(tmp_path)
    hf = type(shared("gpt2")).from_pretrained(tmp_path)
    hf.train()
    hf.transformer.h[1].eval()
    modes = {name: module.training for name, module in hf.named_modules()}
    StandardizedTransformer(hf)  # dropout would break the promises
    assert {name: module.training for name, module in hf.named_modules()} == modes


def test_an_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError, match=r"The model 'no-such/model' could not be loaded: .*Give the id of a causal"):
        StandardizedTransformer("no-such/model", local_files_only=True)


def test_a_folder_with_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="could not be loaded"):
        StandardizedTransformer(tmp_path)


def test_a_demo_that_is_not_there() -> None:
    with pytest.raises(LoadError, match="no demo model 'demo:bert': there are demo:gpt2, demo:llama, demo:smollm2"):
        StandardizedTransformer("demo:bert")


def test_the_demos_load_in_float32_with_their_tokenizer() -> None:
    for name in ("demo:gpt2", "demo:llama"):
        model = StandardizedTransformer(name)
        assert model.hf_model.dtype == torch.float32
        assert model.tokenizer.decode(model.prepare("The capital")["input_ids"][0]) == "The capital"


def test_call_is_the_model_on_prompts() -> None:
    model = StandardizedTransformer(shared("llama"))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        output: Any = model(ids, output_hidden_states=True)
        assert torch.equal(output.logits, model.hf_model(ids).logits)
    assert len(output.hidden_states) == 4
    assert output.logits.shape[-1] == VOCAB


def test_a_module_that_is_no_hugging_face_model() -> None:
    with pytest.raises(InputError, match=r"Linear is no Hugging Face model: .*nnatomy\.Traceable"):
        StandardizedTransformer(torch.nn.Linear(2, 2))


def test_a_tokenizer_by_its_folder() -> None:
    demo = StandardizedTransformer("demo:gpt2")
    model = StandardizedTransformer(demo.hf_model, tokenizer="demo:llama", validate=False)
    assert model.tokenizer("Japan is in")["input_ids"] == demo.tokenizer("Japan is in")["input_ids"]
    with pytest.raises(LoadError, match="The tokenizer '/no/where' could not be loaded"):
        StandardizedTransformer(demo.hf_model, tokenizer="/no/where")


def test_models_of_ones_own_that_are_not_as_hugging_faces() -> None:
    class NoMask(LlamaForCausalLM):
        def forward(self, input_ids: Any, use_cache: bool | None = None) -> Any:
            return super().forward(input_ids, use_cache=use_cache)

    class Tuple(LlamaForCausalLM):
        def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(input_ids, attention_mask=attention_mask, return_dict=False, **kwargs)

    class OtherName(LlamaForCausalLM):
        def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return {"scores": super().forward(input_ids, attention_mask=attention_mask, **kwargs).logits}

    config, ids = shared("llama").config, prompt_ids()
    for kind in (NoMask, Tuple):
        model = StandardizedTransformer(kind(config))
        with torch.no_grad():
            result = LlamaForCausalLM.forward(model.hf_model, ids, output_hidden_states=True, return_dict=True)
            with model.trace(ids):
                assert torch.equal(model.layers_output[1], result.hidden_states[2])
                assert torch.equal(model.logits, result.logits)
        assert model.takes_padding == (kind is Tuple)
    model = StandardizedTransformer(NoMask(config))
    with pytest.raises(InputError, match="of 2, 1 tokens.*: its forward has no argument attention_mask"):
        model.trace([[3, 4], [5]])
    with pytest.raises(InputError, match=r"OtherName returned a dict, and not an output with logits"):
        StandardizedTransformer(OtherName(config))
    model = StandardizedTransformer(shared("llama"))
    with torch.no_grad(), model.trace(ids, return_dict=False):
        assert torch.equal(model.logits, model.hf_model(ids).logits)
