"""`make vllm`: a real language model, SmolLM2-135M-Instruct out of a package of the index, on the engine and in Transformers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from vllm_models import assert_near, on_engine, plainly

from nnatomy import StandardizedTransformer
from nnatomy.names import OF_MIXERS, ROUTERS
from nnatomy.standardized.loading import locate
from nnatomy.vllm import VllmTransformer

TEXTS = ["The capital of France is", "Two and two make", "Once upon a time, in a land far away, there"]


@cache
def model() -> VllmTransformer:
    on_engine("mixtral")
    return StandardizedTransformer(
        "demo:smollm2", engine="vllm", dtype="float32", max_model_len=128, kv_cache_memory_bytes=1 << 28
    )


@cache
def in_transformers() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    place = locate("demo:smollm2")
    hf = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return hf.eval(), transformers.AutoTokenizer.from_pretrained(place)


def test_every_name_of_a_dense_model_is_proven() -> None:
    counts = model().validation.counts
    assert counts["failed"] == counts["unverified"] == 0
    refused = {row.name for row in model().validation if row.status == "refused"}
    assert refused == {*ROUTERS, *OF_MIXERS}


def test_streams_are_those_of_transformers() -> None:
    hf, tokenizer = in_transformers()
    with model().trace(TEXTS):
        ids, mask = model().input_ids, model().attention_mask.bool()
        streams, logits = model().layers_input[:], model().logits
    for row, text in enumerate(TEXTS):
        given = tokenizer(text, return_tensors="pt").input_ids
        assert torch.equal(ids[row][mask[row]], given[0])
        with torch.no_grad():
            theirs = hf(given, output_hidden_states=True)
        for i in (0, 1, 15, 29):
            assert_near(streams[i][row][mask[row]], theirs.hidden_states[i][0], 1e-3)
        assert_near(logits[row][mask[row]], theirs.logits[0])


def test_text_is_what_transformers_writes() -> None:
    hf, tokenizer = in_transformers()
    theirs = []
    for text in TEXTS:
        given = tokenizer(text, return_tensors="pt")
        out = hf.generate(**given, max_new_tokens=12, do_sample=False)
        theirs.append(tokenizer.decode(out[0, given.input_ids.shape[1] :], skip_special_tokens=True))
    assert model().generate_text(TEXTS, max_new_tokens=12) == theirs
    assert model().generate_text(TEXTS[0], max_new_tokens=12) == theirs[0]


def test_tokens_stream_while_a_block_reads() -> None:
    """A direction that is read in one step steers the next; text is there token by token."""
    written, norms = "", []
    with model().generate(TEXTS[0], max_new_tokens=6, ignore_eos=True) as tracer:
        for _ in tracer.iter[:]:
            norms.append(float(model().layers_output[20][0, -1].norm()))
            written += model().tokenizer.decode(model().sampled_tokens)
        (output,) = tracer.result
    assert written == output.outputs[0].text
    assert len(norms) == 6


def test_steering_changes_a_text_and_leaves_others_alone() -> None:
    ids = [model().tokenizer(text).input_ids for text in TEXTS]
    plain = plainly(model(), ids, 8, ignore_eos=True)
    with model().trace(["I love this wonderful day", "I hate this terrible day"]):
        last = model().layers_output[14][:, -1]
    direction = 4 * (last[0] - last[1])

    def steer() -> None:
        row = model().requests.index(1) if 1 in model().requests else None
        if row is not None:
            model().layers_output[14][row] += direction

    steered = [
        list(one.outputs[0].token_ids)
        for one in model().edit(steer).generate(TEXTS, max_new_tokens=8, ignore_eos=True).run()
    ]
    assert steered[1] != plain[1]
    assert [steered[0], steered[2]] == [plain[0], plain[2]]


@pytest.mark.parametrize("layer", [3, 20])
def test_an_ablated_attention_is_that_of_transformers(layer: int) -> None:
    hf, tokenizer = in_transformers()
    given = tokenizer(TEXTS[2], return_tensors="pt").input_ids
    handle = hf.model.layers[layer].self_attn.register_forward_hook(lambda *args: (0 * args[2][0], *args[2][1:]))
    with torch.no_grad():
        theirs = hf(given).logits
    handle.remove()
    with model().trace(given[0].tolist()):
        model().heads_output[layer] = 0 * model().heads_output[layer]
        assert_near(model().logits, theirs)
