"""`make vllm`: which names are proven on which architecture, by Transformers and by algebra; and what does not load, and why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from vllm_models import FIELDS, assert_near, folder, hooked, in_transformers, on_engine, prompts

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError, InputError, LoadError, NotInThisModelError
from nnatomy.names import OF_LAYERS, OF_MIXERS, ROUTERS, SUMS

INSIDE = {
    *("queries", "keys", "values", "heads_output"),
    *("attention_scores", "attention_probabilities", "values_weighted"),
}
EXPERTS = {"routers_experts", "routers_weights", "neurons"}
#: By model type the names that no layer has, and those that can only be read. All others are on each layer, and assignable.
REFUSED: dict[str, tuple[set[str], set[str]]] = {
    "llama": ({*ROUTERS}, set()),
    "qwen2": ({*ROUTERS}, set()),
    "qwen3": ({*ROUTERS}, set()),
    "gemma2": ({*ROUTERS}, set()),
    "gemma3_text": ({*ROUTERS}, set()),
    "gpt2": ({*ROUTERS}, {"layers_mid"}),
    "opt": (
        {*ROUTERS, "mlps_input", "mlps_output", "queries"},
        {"layers_mid"},
    ),  # its queries are scaled before the kernel
    "gpt_neox": ({*ROUTERS, *INSIDE, "layers_mid"}, set()),
    "granite": (
        {*ROUTERS, *SUMS} - {"layers_mid", "cross_attentions_contribution"},
        {"layers_mid"},
    ),  # what is added is scaled, and nowhere to be seen
    "mixtral": (EXPERTS, set()),
    "qwen3_moe": (EXPERTS, set()),
    "gpt_oss": ({*EXPERTS, "attention_scores"}, set()),  # with sinks, scores are shifted in Transformers
}


def test_every_model_is_in_the_table() -> None:
    assert REFUSED.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_names_are_proven(name: str) -> None:
    model = on_engine(name)
    refused, only_read = REFUSED[name]
    assert "of Transformers" in model.validation["validation"].detail
    found, read = set(), set()
    for row in model.validation:
        if row.layer is None:
            assert row.status == "verified", str(row)
        elif row.status == "refused":
            found.add(row.name)
        else:
            assert row.status == "verified", str(row)
            assert row.error is not None
            assert row.error < 1e-5
            if row.detail:
                read.add(row.name)
    elsewhere = {
        *OF_MIXERS,
        *(one for one in OF_LAYERS if one.startswith("cross")),
    }  # of recurrent mixers, and of encoders
    assert found - elsewhere == refused
    assert read == only_read


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral", "opt"])
def test_names_are_those_of_transformers(name: str) -> None:
    """Without this library on the other side: streams, patterns and logits, of prompts longer than any window."""
    model, ids = on_engine(name), prompts(12, 7)
    with model.trace(ids):
        streams = model.layers_input[:]
        pattern, logits = model.attention_probabilities[-1], model.logits
    for row, prompt in enumerate(ids):
        with torch.no_grad():
            theirs = in_transformers(name)(torch.tensor([prompt]), output_hidden_states=True, output_attentions=True)
        own = slice(12 - len(prompt), None)
        for i in range(3):
            assert_near(streams[i][row, own], theirs.hidden_states[i][0])
        assert_near(pattern[row, :, own, own], theirs.attentions[-1][0])
        assert_near(logits[row, own], theirs.logits[0])


def test_an_expert_is_chosen_by_the_routers_logits() -> None:
    model, hf, ids = on_engine("mixtral"), in_transformers("mixtral"), prompts(6)

    def first_two(logits: Any) -> Any:
        return torch.tensor([9.0, 8.0, 0.0, 0.0]).expand_as(logits).contiguous()

    gate = hf.model.layers[1].mlp.gate
    with torch.no_grad():
        with model.trace(ids):
            model.routers_logits[1] = first_two(model.routers_logits[1])
            mine = model.mlps_output[1]
        given = []
        with hooked(hf.model.layers[1].mlp, lambda args, kwargs, output: given.append((args[0], output))):
            hf(torch.tensor(ids))
        x, _ = given[0]
        weights = torch.tensor([9.0, 8.0]).softmax(0)
        experts = hf.model.layers[1].mlp.experts
        index = torch.tensor([[0, 1]]).expand(6, 2)
        theirs = experts(x[0], index, weights.expand(6, 2))
    assert gate.weight.shape == (4, 64)
    assert_near(mine[0], theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "granite", "mixtral"])
def test_algebra_proves_what_it_can_and_no_more(name: str) -> None:
    """Nothing is proven that is not what it is in Transformers, but for what has another scale there."""
    by_algebra = StandardizedTransformer(on_engine(name).engine.llm, engine="vllm", validate="algebra")
    assert "by the stream's algebra: validate='algebra'" in by_algebra.validation["validation"].detail
    refused, _ = REFUSED[name]
    for one in (
        "layers_input",
        "layers_output",
        "attentions_output",
        "keys",
        "attention_probabilities",
        "heads_output",
    ):
        assert by_algebra.validation[one, 1].status == "verified"
    for one in ("attentions_contribution", "mlps_contribution"):
        assert (by_algebra.validation[one, 1].status == "verified") == (name != "granite")
    for one in (*ROUTERS, "neurons"):
        assert by_algebra.validation[one, 1].status == "refused"
    with (
        by_algebra.trace(prompts(5)),
        pytest.raises(NotInThisModelError, match="no equation shows it|it has no experts|chooses them"),
    ):
        by_algebra.neurons[0] if name == "mixtral" else by_algebra.routers_logits[0]


def test_an_attention_that_looks_by_another_rule_has_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4's layers look at chunks, of which prompts that are proven on show nothing."""
    own = {
        "attention_chunk_size": 128,
        "no_rope_layers": [1, 1, 0],
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
    }
    kinds = {"layer_types": ["chunked_attention", "chunked_attention", "full_attention"], "intermediate_size_mlp": 96}
    monkeypatch.setitem(FIELDS, "llama4_text", {**FIELDS["llama"], "max_position_embeddings": 256, **own, **kinds})
    model, (prompt,) = on_engine("llama4_text", max_model_len=256), prompts(150)
    with torch.no_grad():
        theirs = in_transformers("llama4_text")(torch.tensor([prompt]), output_hidden_states=True)
    with model.trace([prompt]):
        for name in ("keys", "values", "attention_scores", "attention_probabilities", "values_weighted"):
            with pytest.raises(
                NotInThisModelError, match=rf"^{name}\[0\]: the engine's ChunkedLocalAttention looks at"
            ):
                getattr(model, name)[0]
        assert model.heads_output[0].shape == (1, 150, 2, 32)
        assert_near(model.layers_input[2][0], theirs.hidden_states[2][0])
        pattern = model.attention_probabilities[2]
    assert_near(pattern.sum(-1), torch.ones(1, 2, 150))


def test_what_is_only_read_says_why() -> None:
    model = on_engine("gpt2")
    with (
        model.trace(prompts(5)),
        pytest.raises(AssignmentError, match=r"layers_mid\[1\] can be read, and not assigned: the layer adds"),
    ):
        model.layers_mid[1] = model.layers_mid[1]
    with model.trace(prompts(5)):
        model.layers_mid[1].zero_()
        with pytest.raises(AssignmentError, match=r"layers_mid\[1\] was changed in place, and can only be read"):
            model.layers_output[1]


def test_half_precision() -> None:
    half = on_engine("llama", dtype="bfloat16")
    assert half.validation["layers_output", 2].status == "verified"
    ids = prompts(5, 8)
    with half.trace(ids):
        stream = half.layers_output[1]
    assert stream.dtype == torch.bfloat16
    new = torch.randn(2, 8, 64, dtype=torch.bfloat16)
    with half.trace(ids):
        half.layers_output[1] = new
        given, mask = half.layers_input[2], half.attention_mask.bool()
    assert torch.equal(given[mask], new[mask])


def test_what_does_not_load_says_why(tmp_path: Path) -> None:
    place = folder("llama")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"device_map": "auto"}, InputError, "device_map='auto': that is an argument of Transformers"),
        (
            {"max_modle_len": 64},
            InputError,
            r"max_modle_len=64: vLLM [\d.]+ takes no such argument. Did you mean max_model_len",
        ),
        ({"enforce_eager": False}, InputError, "enforce_eager=False: it has to be True: a compiled model"),
        (
            {"enable_prefix_caching": True},
            InputError,
            "enable_prefix_caching=True: it has to be False: keys and values",
        ),
        ({"async_scheduling": True}, InputError, "async_scheduling=True: it has to be False"),
        ({"speculative_config": {"method": "ngram"}}, InputError, "speculative_config=.*: it has to be None"),
        ({"server": "localhost"}, InputError, "server=..., engine=...: a server says itself"),
        ({"max_model_len": 10**6}, LoadError, "vLLM could not load .*max_model_len"),
        ({"max_model_len": "abc"}, LoadError, "vLLM could not load .*: max_model_len: Input should be a valid integer"),
        ({"dtype": "float8"}, LoadError, "vLLM could not load"),
    ]
    for given, error, text in cases:
        with pytest.raises(error, match=text):
            StandardizedTransformer(place, engine="vllm", **given)
    with pytest.raises(InputError, match="the engine loads its model itself; a loaded LlamaForCausalLM was given"):
        StandardizedTransformer(in_transformers("llama"), engine="vllm")
    with pytest.raises(InputError, match="dtype: arguments of vllm.LLM, but the engine is already loaded"):
        StandardizedTransformer(on_engine("llama").engine.llm, engine="vllm", dtype="float32")
    with pytest.raises(LoadError, match="There is no folder"):
        StandardizedTransformer(tmp_path / "nothing", engine="vllm")


def test_loading_leaves_the_process_as_it_was() -> None:
    torch.manual_seed(3)
    state, environment = torch.get_rng_state(), dict(os.environ)
    on_engine("llama", max_num_seqs=3)
    assert torch.equal(state, torch.get_rng_state())
    assert environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    assert torch.nn.Module._call_impl.__module__ == "torch.nn.modules.module"


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_tokenizer_that_is_given_writes_the_text(is_folder: bool, tmp_path: Path) -> None:
    """The folder of the model has none; what the words are is written out here."""
    words = {f"w{96 - i}": i for i in range(97)}
    own = Tokenizer(WordLevel(words, unk_token="w96"))
    own.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="w96")
    tokenizer.save_pretrained(tmp_path)
    given = tmp_path if is_folder else tokenizer
    model = on_engine.__wrapped__("llama", tokenizer=given, validate=False)
    (output,) = model.generate("w90 w5 w20", max_new_tokens=4, ignore_eos=True).run()
    assert output.prompt_token_ids == [6, 91, 76]
    tokens = list(output.outputs[0].token_ids)
    wanted = [f"w{96 - token}" for token in tokens]
    assert output.outputs[0].text.split() == wanted
    assert model.generate_text("w90 w5 w20", max_new_tokens=4, ignore_eos=True).split() == wanted
    (stopped,) = model.generate("w90 w5 w20", max_new_tokens=4, ignore_eos=True, stop=wanted[1]).run()
    assert list(stopped.outputs[0].token_ids) == tokens[:2]


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="The prompt is text, but there is no tokenizer"):
        on_engine("llama").trace("Hello")
    with pytest.raises(InputError, match="Text needs a tokenizer"):
        on_engine("llama").generate_text(prompts(5))
