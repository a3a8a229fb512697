"""Errors and corner cases of accessors, steering, the head, skipping, scanning."""

from __future__ import annotations

import subprocess
import sys
import traceback
from typing import Any

import pytest
import torch
from architectures import VOCAB, build, prompt_ids, shared
from owners import owner

from nnatomy import StandardizedTransformer
from nnatomy.errors import (
    AssignmentError,
    InputError,
    LayerIndexError,
    NoSuchModuleError,
    NotReachedError,
    OutOfOrderError,
    OutsideTraceError,
)


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer(shared("llama"))


def test_outside_of_a_trace(model: StandardizedTransformer) -> None:
    for read in (
        lambda: model.layers_output[0],
        lambda: model.attention_probabilities[0],
        lambda: model.logits,
        lambda: model.token_embeddings,
        lambda: model.input_ids,
        lambda: model.layers_output[:],
        lambda: model.skip_layer(0),
        lambda: model.steer(0, torch.zeros(32)),
    ):
        with pytest.raises(OutsideTraceError, match=r"values exist only while the model runs.*with model.trace"):
            read()


@pytest.mark.parametrize("layer", [3, -4, 100])
def test_a_layer_out_of_range(model: StandardizedTransformer, layer: int) -> None:
    with model.trace(prompt_ids()):
        with pytest.raises(LayerIndexError, match=rf"layers_output\[{layer}\]: the model has 3 layers, 0 to 2\."):
            model.layers_output[layer]
        with pytest.raises(IndexError, match="the model has 3 layers"):
            model.steer(layer, torch.zeros(32))
        with pytest.raises(IndexError, match="the model has 3 layers"):
            model.skip_layer(layer)
        assert model.layers_output[0].shape == (2, 9, 32)  # nothing is lost


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            torch.zeros(2, 9, 31),
            r"is torch.float32 of shape \(2, 9, 32\) on cpu; what was assigned .*\(2, 9, 31\)",
        ),
        (torch.zeros(32), r"give it the shape \(2, 9, 32\) \(x.expand\(2, 9, 32\) broadcasts\)"),
        (torch.zeros(2, 9, 32, dtype=torch.float16), r"convert it with x.to\('cpu', torch.float32\)"),
        (torch.zeros(2, 9, 32, device="meta"), r"on meta: convert it with x.to\('cpu', torch.float32\)"),
        (0.0, "layers_output\\[1\\] is a tensor; a float was assigned."),
        (None, "a NoneType was assigned"),
    ],
)
def test_a_value_that_does_not_fit(model: StandardizedTransformer, value: Any, text: str) -> None:
    with torch.no_grad():
        plain = model(prompt_ids()).logits
        with model.trace(prompt_ids()):
            with pytest.raises(AssignmentError, match=text):
                model.layers_output[1] = value
            assert torch.equal(model.logits, plain)  # nothing is lost


def test_logits_and_embeddings_are_checked_too(model: StandardizedTransformer) -> None:
    with model.trace(prompt_ids()):
        with pytest.raises(AssignmentError, match="token_embeddings is"):
            model.token_embeddings = torch.zeros(1)
        with pytest.raises(AssignmentError, match="logits is"):
            model.logits = torch.zeros(1)


def test_out_of_order(model: StandardizedTransformer) -> None:
    with model.trace(prompt_ids()):
        _ = model.layers_output[1]
        with pytest.raises(OutOfOrderError, match=r"layers_output\[0\] was asked for at .*test_accessors.py:\d+"):
            _ = model.layers_output[0]
        with pytest.raises(OutOfOrderError, match=r"stands behind layers_output\[1\]"):
            _ = model.attentions_input[1]
        with pytest.raises(OutOfOrderError, match=r"attention_probabilities\[1\]"):
            _ = model.attention_probabilities[1]
        with pytest.raises(OutOfOrderError, match=r"layers_output\[0\]"):
            _ = model.layers_output[:]
        assert model.layers_output[2].shape == (2, 9, 32)


def test_the_pattern_must_be_asked_for_before_the_attentions_output(model: StandardizedTransformer) -> None:
    with model.trace(prompt_ids()):
        _ = model.attentions_output[1]
        with pytest.raises(OutOfOrderError, match="attention_probabilities"):
            _ = model.attention_probabilities[1]


def test_the_pattern_can_be_asked_for_inside_its_attention(model: StandardizedTransformer) -> None:
    with torch.no_grad(), model.trace(prompt_ids()):
        query = model.layers[1].self_attn.q_proj.output
        inside = model.attention_probabilities[1]
    with torch.no_grad(), model.trace(prompt_ids()):
        pattern = model.attention_probabilities[1]
    assert query.shape == (2, 9, 32)
    assert torch.equal(inside, pattern)


def test_a_kernel_that_holds_no_pattern_says_so() -> None:
    hf = build("llama")
    attention = hf.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(Exception, match=r"attention_probabilities\[1\]: fires 0 times"):
        StandardizedTransformer(hf)
    model = StandardizedTransformer(hf, validate=False)
    with (
        model.trace(prompt_ids()),
        pytest.raises(NotReachedError, match=r"that call has ended without computing one.*attn_implementation='sdpa'"),
    ):
        _ = model.attention_probabilities[1]


def test_a_slice_may_stand_between_single_reads(model: StandardizedTransformer) -> None:
    with torch.no_grad(), model.trace(prompt_ids()):
        one = [model.layers_output[i].clone() for i in range(3)]
    with torch.no_grad(), model.trace(prompt_ids()):
        first = model.layers_output[0]
        rest = model.layers_output[0:3]  # the forward pass stands at its first layer
        logits = model.logits
    assert torch.equal(first, one[0])
    assert all(torch.equal(a, b) for a, b in zip(rest, one, strict=True))
    assert logits.shape == (2, 9, VOCAB)
    with model.trace(prompt_ids()):
        assert model.layers_output[3:] == []
        assert [h.shape for h in model.layers_output[::-2]] == [(2, 9, 32)] * 2


def test_assigning_a_slice(model: StandardizedTransformer) -> None:
    with torch.no_grad(), model.trace(prompt_ids()):
        zeros = [torch.zeros(2, 9, 32)] * 2
        model.attentions_output[1:] = zeros
        one_by_one = model.layers_output[2]
    with torch.no_grad(), model.trace(prompt_ids()):
        model.attentions_output[1] = zeros[0]
        model.attentions_output[2] = zeros[1]
        assert torch.equal(model.layers_output[2], one_by_one)
    with model.trace(prompt_ids()), pytest.raises(AssignmentError, match="is 2 layers; 1 were assigned"):
        model.attentions_output[1:] = zeros[:1]


def test_a_value_the_model_changes_in_place_stays_as_it_was_read() -> None:
    """Falcon adds the attention's output into the MLP's output in place."""
    hf = shared("falcon")
    module = hf.transformer.h[1].mlp
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output.clone()) and None)
    with torch.no_grad():
        plain = hf(prompt_ids()).logits
    handle.remove()
    for validate in (True, False):
        model = StandardizedTransformer(hf, validate=validate)
        mine = torch.randn(2, 9, 32)
        kept = mine.clone()
        with torch.no_grad(), model.trace(prompt_ids()):
            read = model.mlps_output[1]
            logits = model.logits
        with torch.no_grad(), model.trace(prompt_ids()):
            many = model.mlps_output[:]
        with torch.no_grad(), model.trace(prompt_ids()):
            model.mlps_output[1] = mine
            _ = model.logits
        assert torch.equal(read, seen[0])
        assert torch.equal(many[1], seen[0])
        assert torch.equal(logits, plain)
        assert torch.equal(mine, kept)


def test_gradients_reach_what_was_read(model: StandardizedTransformer) -> None:
    with model.trace(prompt_ids()):
        hidden = model.layers_output[1]
        hidden.retain_grad()
        pattern = model.attention_probabilities[2]
        pattern.retain_grad()
        model.logits.sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) > 0
    assert pattern.grad is not None
    assert float(pattern.grad.abs().max()) > 0
    model.hf_model.zero_grad()


def test_steer_adds_where_told(model: StandardizedTransformer) -> None:
    vector = torch.linspace(-1, 1, 32)
    ids = prompt_ids()
    with torch.no_grad(), model.trace(ids):
        clean = model.layers_output[0].clone()
    cases: list[tuple[dict[str, Any], Any]] = [
        ({}, (slice(None), slice(None))),
        ({"token_positions": -1}, (slice(None), -1)),
        ({"token_positions": [0, 2]}, (slice(None), [0, 2])),
        ({"batch_index": 1}, (1,)),
        ({"batch_index": [0, 1], "token_positions": [3, 4]}, ([0, 1], [3, 4])),
        ({"token_positions": torch.tensor([1])}, (slice(None), [1])),
    ]
    for arguments, where in cases:
        expected = clean.clone()
        expected[where] += 2.0 * vector
        with torch.no_grad(), model.trace(ids):
            before = model.layers_output[0]
            model.steer([1, 0], vector, factor=2.0, **arguments)  # in the order of the forward pass
            after_next = model.layers_output[1]
        with torch.no_grad(), model.trace(ids):
            model.layers_output[0] = expected
            unsteered = model.layers_output[1].clone()
        unsteered[where] += 2.0 * vector
        assert torch.equal(after_next, unsteered), arguments
        assert torch.equal(before, clean)  # what was read before stays what it was


def test_skip_layers(model: StandardizedTransformer) -> None:
    ids = prompt_ids()
    with torch.no_grad(), model.trace(ids):
        model.skip_layers(0, 1)
        assert torch.equal(model.layers_output[1], model.hf_model.model.embed_tokens(ids))
    mine = torch.randn(2, 9, 32)
    with torch.no_grad(), model.trace(ids):
        model.skip_layers(1, -1, skip_with=mine)
        assert torch.allclose(model.logits, model.project_on_vocab(mine))
    with model.trace(ids), pytest.raises(LayerIndexError, match="no layers lie between"):
        model.skip_layers(2, 1)


def test_skipping_works_without_validation() -> None:
    model = StandardizedTransformer(shared("bloom"), validate=False)
    with torch.no_grad(), model.trace(prompt_ids()):
        first = model.layers_output[0]
        model.skip_layer(1)
        assert torch.equal(model.layers_output[1], first)
        assert model.logits.shape == (2, 9, VOCAB)


def test_project_on_vocab_refuses_other_widths(model: StandardizedTransformer) -> None:
    with pytest.raises(InputError, match=r"hidden states of width 32; got \(2, 31\)"):
        model.project_on_vocab(torch.zeros(2, 31))


def test_topk_closest_tokens() -> None:
    model = StandardizedTransformer("demo:llama")
    with torch.no_grad(), model.trace("The capital of France is"):
        hidden = model.layers_output[-1][:, -1]
        probs = model.next_token_probs
    (top,) = model.get_topk_closest_tokens(hidden, k=3)
    assert model.get_topk_closest_tokens(hidden[0], k=3) == top
    best = probs[0].topk(3)
    assert list(top) == model.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    assert list(top.values()) == pytest.approx(best.values.tolist(), rel=1e-4)
    with pytest.raises(InputError, match="or \\(rows, hidden\\)"):
        model.get_topk_closest_tokens(hidden[None])


def test_scan_knows_shapes_without_computing_and_without_weights() -> None:
    import copy

    for model_type in ("llama", "gpt2", "gemma2"):
        hf = build(model_type)
        before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
        for scanned in (hf, copy.deepcopy(hf).to("meta")):
            model = StandardizedTransformer(scanned, validate=scanned is hf)
            with model.scan([[3, 4, 5], [6]]):
                assert model.layers_output[1].shape == (2, 3, 32)
                assert model.attention_probabilities[2].shape == (2, 4, 3, 3)
                model.layers_output[2] = model.layers_output[2] * 2
                assert model.logits.shape == (2, 3, VOCAB)
        assert all(type(tensor) is torch.Tensor for tensor in hf.state_dict().values())
        assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())


def test_views_and_names(model: StandardizedTransformer) -> None:
    with torch.no_grad(), model.trace(prompt_ids()):
        assert model.model.layers[0].self_attn.output[0] is model.attentions_output[0]
        assert model.layers[0].mlp.down_proj.output is model.mlps_output[0]
        assert model.layers[0].output is model.layers_output[0]
    assert len(model.layers) == len(model.attentions) == len(model.mlps) == 3
    assert model.attentions[1].module is model.hf_model.model.layers[1].self_attn
    assert [view.module for view in model.mlps[:2]] == [layer.mlp for layer in model.hf_model.model.layers[:2]]
    assert model.lm_head(torch.zeros(1, 32)).shape == (1, VOCAB)
    with pytest.raises(NoSuchModuleError, match=r"no submodule 'layer'.*Did you mean"):
        _ = model.model.layer
    assert "LlamaForCausalLM, 3 layers, hidden 32, 4 heads" in repr(model)


def test_dimensions() -> None:
    expected = {
        "gpt2": (4, 4, 8),
        "gpt_bigcode": (4, 1, 8),
        "falcon": (4, 1, 8),
        "llama": (4, 2, 8),
        "gemma2": (4, 2, 16),
        "deepseek_v3": (4, 4, 12),
    }
    for model_type, (heads, kv_heads, head_dim) in expected.items():
        model = StandardizedTransformer(shared(model_type), validate=False)
        assert (model.num_heads, model.num_kv_heads, model.head_dim) == (heads, kv_heads, head_dim), model_type
        assert (model.hidden_size, model.vocab_size) == (32, VOCAB)


def test_generation_reads_each_step_and_needs_no_block() -> None:
    model = StandardizedTransformer("demo:gpt2")
    tokens = model.generate("The capital of France is", max_new_tokens=3, do_sample=False).run()
    picked = []
    with model.generate("The capital of France is", max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            picked.append(int(model.logits[0, -1].argmax()))
        result = tracer.result
    assert torch.equal(result, tokens)
    assert result[0, -3:].tolist() == picked


def test_an_error_of_the_model_comes_with_two_frames_of_ours_at_most(model: StandardizedTransformer) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("the model's own")

    hook = model.layers[1].module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyError, match="the model's own") as caught, model.trace([[1, 2, 3]]):
            model.layers_output[1]
    finally:
        hook.remove()
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert files[0] == __file__ == files[-1]
    assert 1 <= [owner(file) for file in files].count("us") <= 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_pattern_of_a_step_is_by_query_heads_however_it_is_computed(implementation: str) -> None:
    """Padded, with heads that share keys: SDPA packs the one query of a step by key heads."""
    hf = build("llama", attn_implementation=implementation)
    model = StandardizedTransformer(hf)
    with torch.no_grad(), model.generate([[3, 4, 5, 6], [7, 8]], max_new_tokens=3, do_sample=False) as tracer:
        patterns = [model.attention_probabilities[1] for step in tracer.iter[:]]
        tokens = tracer.result
    reference = build("llama", attn_implementation="eager")
    mask = torch.tensor([[1] * 6, [0, 0] + [1] * 4])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = reference(tokens[:, :6], attention_mask=mask, position_ids=positions, output_attentions=True)
    for step, pattern in enumerate(patterns):
        assert pattern.shape == (2, 4, 4 if step == 0 else 1, 4 + step)
        expected = whole.attentions[1][:, :, 3 + step, : 4 + step]
        assert torch.allclose(pattern[:, :, -1], expected, atol=1e-5)
    with torch.no_grad(), model.generate([[3, 4, 5, 6], [7, 8]], max_new_tokens=2, do_sample=False) as tracer:
        for step in tracer.iter[1]:
            pattern = model.attention_probabilities[1]
            uniform = torch.full_like(pattern, 0.25)
            model.attention_probabilities[1] = uniform
            out = model.attentions_output[1]
    assert not torch.equal(out[0], out[1])


def test_steering_by_a_vector_of_another_width_is_said() -> None:
    model = StandardizedTransformer("demo:gpt2")
    with (
        pytest.raises(InputError, match=r"of shape \(32,\), the model's residual stream of width 96"),
        model.trace("Japan is in"),
    ):
        model.steer(0, torch.zeros(32))


def test_what_cannot_be_assigned_as_a_whole() -> None:
    model = StandardizedTransformer(shared("gpt2"))
    ids, accessor = prompt_ids(), model.mlps_output
    for name in ("mlps_output", "layers_output", "queries", "neurons", "layers_mid"):
        with (
            pytest.raises(AssignmentError, match=rf"{name} is one for each layer: assign {name}\[i\] = "),
            model.trace(ids),
        ):
            setattr(model, name, torch.zeros(1))
    with pytest.raises(AssignmentError, match=r"transformer is a module: assign its value, transformer\.output"):
        model.transformer = torch.zeros(1)
    with (
        pytest.raises(NoSuchModuleError, match="has no submodule 'logitz'. Did you mean 'logits'"),
        model.trace(ids),
    ):
        model.logitz = torch.zeros(1)
    assert model.mlps_output is accessor
    model.note = "mine"  # outside of a trace it is the user's own
    assert model.note == "mine"


def test_arguments_of_other_types() -> None:
    """In a process of its own: in this one the runtime checks of types come first."""
    script = """
import torch
from nnatomy import StandardizedTransformer
model = StandardizedTransformer("demo:gpt2", validate=False)
wide = model.hidden_size

def refused(kind, text, ask):
    try:
        with model.trace([3, 4, 5]):
            ask()
    except Exception as error:
        assert type(error).__name__ == kind and text in str(error), repr(error)
    else:
        raise AssertionError(text)

for layer in ("3", None, [0, 1], 1.0):
    refused("LayerIndexError", f"layers_output[{layer!r}]: layers are counted, 0 to", lambda: model.layers_output[layer])
refused("InputError", "token_positions='last'", lambda: model.steer(0, torch.ones(wide), token_positions="last"))
refused("InputError", "validate='shape': it is", lambda: StandardizedTransformer(model.hf_model, validate="shape"))
with model.trace([3, 4, 5]):
    model.steer(0, [1.0] * wide)
    steered = model.layers_output[0]
with model.trace([3, 4, 5]):
    plain = model.layers_output[0]
assert torch.allclose(steered, plain + 1, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_steering_that_does_not_fit() -> None:
    model = StandardizedTransformer(shared("gpt2"))
    wide = model.hidden_size
    for where in ({"token_positions": 9}, {"batch_index": 3}):
        with pytest.raises(InputError, match="do not fit a stream of"), model.trace([3, 4, 5]):
            model.steer(0, torch.ones(wide), **where)


def test_skipping_with_what_does_not_fit() -> None:
    model = StandardizedTransformer(shared("gpt2"))
    for wrong in (torch.zeros(1, 3, 31), torch.zeros(1, 2, 32), torch.zeros(1, 3, 32, dtype=torch.float64)):
        with pytest.raises(AssignmentError, match="skip_with of layer 1"), model.trace([3, 4, 5]):
            model.skip_layers(1, 2, wrong)
    with model.trace([3, 4, 5]):
        model.skip_layers(1, 2, torch.ones(1, 3, 32))
        last = model.layers_output[2]
    assert torch.equal(last, torch.ones(1, 3, 32))
