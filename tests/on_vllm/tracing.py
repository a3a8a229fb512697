"""`make vllm`: one step of the engine, against plain hooks on its own modules and against Transformers."""

from __future__ import annotations

import pytest
import torch
from vllm_models import assert_near, hidden_states, hooked, in_transformers, on_engine, plainly, prompts

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError, LayerIndexError, NotInThisModelError, OutOfOrderError, OutsideTraceError
from nnatomy.vllm import VllmTransformer

IDS = prompts(5, 9, 5)


def model() -> VllmTransformer:
    return on_engine("llama")


def layer(i: int) -> torch.nn.Module:
    return model().engine.model.model.layers[i]


def test_streams_are_what_plain_hooks_see() -> None:
    pairs = []
    with hooked(layer(1), lambda args, kwargs, output: pairs.append((output[0] + output[1]).clone())):
        plainly(model(), IDS)
    with model().trace(IDS):
        stream = model().layers_output[1]
        mask, requests = model().attention_mask, model().requests
    assert requests == (0, 1, 2)
    assert torch.equal(stream[mask.bool()], pairs[0])
    assert not stream[~mask.bool()].any()
    assert mask.sum(1).tolist() == [5, 9, 5]
    assert mask[:, -1].all()


def test_rows_of_one_length_are_what_plain_hooks_see() -> None:
    ids, pairs = prompts(6, 6), []
    with hooked(layer(0), lambda args, kwargs, output: pairs.append((output[0] + output[1]).clone())):
        plainly(model(), ids)
    with model().trace(ids):
        assert torch.equal(model().layers_output[0].flatten(0, 1), pairs[0])


def test_queries_keys_values_are_what_plain_hooks_see() -> None:
    given = []
    with hooked(
        layer(2).self_attn.attn, lambda args, kwargs, output: given.append([one.clone() for one in (*args, output)])
    ):
        plainly(model(), prompts(6, 6))
    (q, k, v, heads) = given[0]
    with model().trace(prompts(6, 6)):
        names = [getattr(model(), name)[2] for name in ("queries", "keys", "values")]
        pattern, mine = model().attention_probabilities[2], model().heads_output[2]
    for one, flat in zip(names, (q, k, v), strict=True):
        assert torch.equal(one.transpose(1, 2).reshape(12, -1), flat)
    assert torch.equal(mine.reshape(12, -1), heads)
    assert_near((pattern @ names[2].expand(2, 2, 6, 32)).transpose(1, 2), mine)


@pytest.mark.parametrize("row", [0, 1])
def test_names_are_those_of_transformers(row: int) -> None:
    ids = IDS[row]
    with torch.no_grad():
        theirs = in_transformers("llama")(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    with model().trace(IDS):
        embeddings = model().token_embeddings
        streams = model().layers_input[:]
        pattern = model().attention_probabilities[2]
        logits = model().logits
    own = slice(-len(ids), None)
    assert_near(embeddings[row, own], theirs.hidden_states[0][0])
    for i in range(3):
        assert_near(streams[i][row, own], theirs.hidden_states[i][0])
    assert_near(pattern[row, :, own, own], theirs.attentions[2][0])
    assert_near(logits[row, own], theirs.logits[0])
    assert torch.equal(logits[row, -1].argmax(), theirs.logits[0, -1].argmax())


def test_reading_changes_nothing() -> None:
    found = []
    head = model().engine.model.logits_processor
    with hooked(head, lambda args, kwargs, output: found.append(output.clone())):
        plainly(model(), IDS)
        with model().trace(IDS, early_stop=False):
            for i in range(3):
                for name in (
                    "layers_input",
                    "queries",
                    "attention_probabilities",
                    "heads_output",
                    "layers_mid",
                    "layers_output",
                ):
                    getattr(model(), name)[i]
    assert torch.equal(found[0], found[1])


def test_a_written_stream_is_what_the_next_layer_adds_up() -> None:
    found = []
    new = torch.randn(3, 9, 64)
    with (
        hooked(layer(2).input_layernorm, lambda args, kwargs, output: found.append(output[1].clone())),
        model().trace(IDS),
    ):
        model().layers_output[1] = new
        mask = model().attention_mask.bool()
        model().layers_output[2]
    assert torch.equal(found[0], new[mask])


def test_edits_do_what_hooks_do_in_transformers() -> None:
    """Twice the stream after layer 0, and half of what the attention of layer 1 gives."""
    hf = in_transformers("llama")
    layers = hf.model.layers
    with (
        hooked(layers[0], lambda args, kwargs, output: 2 * output),
        hooked(layers[1].self_attn, lambda args, kwargs, output: (output[0] / 2, *output[1:])),
        torch.no_grad(),
    ):
        theirs = hf(torch.tensor([IDS[1]])).logits
    with model().trace([IDS[1]]) as tracer:
        model().layers_output[0] = 2 * model().layers_output[0]
        model().attentions_output[1] = model().attentions_output[1] / 2
        logits = model().logits
        (output,) = tracer.result
    assert_near(logits, theirs)
    assert output.outputs[0].token_ids[0] == int(theirs[0, -1].argmax())


def test_a_value_changed_in_place_is_put_back() -> None:
    with model().trace(IDS):
        stream = model().layers_output[0]
        stream *= 2
        assert model().layers_output[0] is stream
        changed = model().logits
    with model().trace(IDS):
        model().layers_output[0] = 2 * model().layers_output[0]
        assert torch.equal(model().logits, changed)
    with model().trace(IDS):
        stream = model().layers_output[0]
        stream *= 0
        model().layers_output[0] = stream + 1  # what is assigned counts, and not what was changed before
        ones = model().layers_input[1]
    assert torch.equal(ones, torch.ones_like(ones)[:, :] * model_mask(ones))


def model_mask(like: torch.Tensor) -> torch.Tensor:
    lengths = torch.tensor([5, 9, 5])
    return (torch.arange(like.shape[1], 0, -1)[None] <= lengths[:, None])[..., None].float()


def test_a_written_pattern_takes_the_place_of_the_kernels() -> None:
    with model().trace(IDS):
        values = model().values[1]
        pattern = model().attention_probabilities[1]
        model().attention_probabilities[1] = torch.eye(9).expand_as(pattern).contiguous()
        heads = model().heads_output[1]
        edited = model().logits
    own = model_mask(edited).bool()[..., 0]
    assert torch.equal(heads[own], values.expand(3, 2, 9, 32).transpose(1, 2)[own])
    with model().trace(IDS):
        model().heads_output[1] = heads
        assert_near(model().logits, edited, 1e-6)


def test_written_logits_are_sampled_from() -> None:
    with model().trace(IDS) as tracer:
        logits = model().logits
        logits[:, -1] = 0
        logits[torch.arange(3), -1, torch.tensor([7, 8, 9])] = 10
        outputs = tracer.result
    assert [output.outputs[0].token_ids[0] for output in outputs] == [7, 8, 9]


def test_project_on_vocab_gives_the_logits() -> None:
    with model().trace(IDS):
        stream, logits = model().layers_output[-1], model().logits
        probs = model().next_token_probs
    own = model_mask(stream).bool()[..., 0]
    assert_near(model().project_on_vocab(stream)[own], logits[own])
    assert_near(probs, logits[:, -1].softmax(-1))


def test_a_block_that_ends_stops_the_engine_which_can_be_used_again() -> None:
    calls = []
    expected = plainly(model(), IDS)
    with hooked(layer(2), lambda args, kwargs, output: calls.append(1)):
        for _ in range(3):
            with model().trace(IDS):
                model().layers_output[0]
        assert not calls
        with pytest.raises(ZeroDivisionError), model().trace(IDS):
            model().layers_output[0]
            1 / 0
    assert not model().engine.is_busy
    assert plainly(model(), IDS) == expected
    assert torch.nn.Module._call_impl.__module__ == "torch.nn.modules.module"


def test_modules_are_read_under_the_engines_own_names() -> None:
    with model().trace(IDS):
        hidden, residual = model().model.layers[1].output
    with model().trace(IDS):
        stream = model().layers_output[1]
    assert torch.equal(stream[model_mask(stream).bool()[..., 0]], hidden + residual)


def test_mid_and_contributions_add_up() -> None:
    with model().trace(IDS):
        before = model().layers_input[1]
        mid, attention = model().layers_mid[1], None
        rest, after = model().mlps_contribution[1], model().layers_output[1]
    with model().trace(IDS):
        attention = model().attentions_contribution[1]
    assert_near(before + attention, mid, 1e-6)
    assert_near(mid + rest, after, 1e-6)


def test_what_was_added_stays_what_it_was_when_the_sum_is_written() -> None:
    """Both are at one point of the engine's: the layer's pair, and what its norm in the middle is given."""
    with model().trace(IDS):
        attention, mlp = model().attentions_contribution[1], model().mlps_contribution[1]
    with model().trace(IDS):
        model().layers_mid[1] = 3 * model().layers_mid[1]
        assert torch.equal(model().attentions_contribution[1], attention)
        with pytest.raises(OutOfOrderError, match="the sum of both has been written before"):
            model().attentions_contribution[1] = attention
    with model().trace(IDS):
        model().layers_output[1] *= 2
        assert torch.equal(model().mlps_contribution[1], mlp)
        model().layers_output[1] *= 2
        assert torch.equal(model().mlps_contribution[1], mlp)
        four = model().layers_input[2]
    with model().trace(IDS):
        model().layers_output[1] = 4 * model().layers_output[1]
        assert torch.equal(model().layers_input[2], four)
    doubled = model().attach("layers_output[1]", torch.nn.Identity(), how="add", name="twice")
    with doubled.trace(IDS):
        assert torch.equal(doubled.mlps_contribution[1], mlp)


def test_what_is_wrong_is_said_at_the_line() -> None:
    with pytest.raises(OutsideTraceError, match=r"layers_output: values exist only while the model runs"):
        model().layers_output[0]
    with model().trace(IDS):
        with pytest.raises(LayerIndexError, match=r"layers_output\[3\]: the model has 3 layers, 0 to 2"):
            model().layers_output[3]
        with pytest.raises(NotInThisModelError, match=r"routers_logits\[0\]: it has no experts to choose from"):
            model().routers_logits[0]
        with pytest.raises(AssignmentError, match=r"layers_output\[1\] is .*of shape \(3, 9, 64\)"):
            model().layers_output[1] = torch.zeros(3, 9, 63)
        with pytest.raises(
            AssignmentError, match=r"layers_output\[1:\] is 2 layers; a Tensor was assigned\. Give a list"
        ):
            model().layers_output[1:] = torch.tensor(0.0)
        with pytest.raises(OutOfOrderError, match=r"layers_output\[0\] was asked for"):
            model().layers_output[0]
    with pytest.raises(AssignmentError, match="layers_output is one for each layer"):
        model().layers_output = torch.zeros(1)
    with pytest.raises(AssignmentError, match="input_ids can be read, and not assigned"):
        model().input_ids = torch.zeros(1)


def test_it_is_what_the_entry_gives() -> None:
    assert isinstance(model(), VllmTransformer)
    again = StandardizedTransformer(model().engine.llm, engine="vllm", validate="algebra")
    assert again.validation["layers_output", 1].status == "verified"
    assert hidden_states("llama", IDS[0])[0].shape == (1, 5, 64)
