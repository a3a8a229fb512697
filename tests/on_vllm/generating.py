"""`make vllm`: steps of generations, many prompts in flight, steering; against Transformers and against the engine by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_models import assert_near, hidden_states, hooked, in_transformers, on_engine, plainly, prompts, written

from nnatomy.errors import AssignmentError, InputError, NotInThisModelError, UsageError
from nnatomy.vllm import VllmTransformer

#: More prompts than fit into a step, of which some are longer than a step's tokens.
SMALL = {"max_num_batched_tokens": 16, "max_num_seqs": 4}


def model() -> VllmTransformer:
    return on_engine("llama")


def test_steps_are_those_of_transformers() -> None:
    ids = prompts(4, 7)
    with model().generate(ids, max_new_tokens=4, ignore_eos=True) as tracer:
        streams: list[Tensor] = []
        tokens, given = [], []
        for _ in tracer.iter[:]:
            given.append(model().input_ids)
            streams.append(model().layers_input[2])
            tokens.append(model().sampled_tokens)
        outputs = tracer.result
    for row, prompt in enumerate(ids):
        wanted = written(prompt, 4)
        assert [int(step[row]) for step in tokens] == wanted == list(outputs[row].outputs[0].token_ids)
        theirs = hidden_states("llama", [*prompt, *wanted[:-1]])[2][0]
        mine = torch.cat([streams[0][row, -len(prompt) :], *(step[row] for step in streams[1:])])
        assert_near(mine, theirs)
        assert torch.equal(given[1][row], tokens[0][row : row + 1])


def test_keys_so_far_are_those_of_a_whole_pass() -> None:
    (prompt,) = prompts(6)
    with model().generate([prompt], max_new_tokens=3, ignore_eos=True) as tracer:
        for _ in tracer.iter[2]:
            keys, values, pattern = model().keys[1], model().values[1], model().attention_probabilities[1]
        (output,) = tracer.result
    whole = [*prompt, *output.outputs[0].token_ids[:2]]
    with model().trace([whole]):
        k, v, p = model().keys[1], model().values[1], model().attention_probabilities[1]
    assert keys.shape == (1, 1, 8, 32)
    assert_near(keys, k)
    assert_near(values, v)
    assert_near(pattern, p[:, :, -1:])


def test_keys_before_a_window_that_are_gone_are_not_shown() -> None:
    """The engine lets go of blocks of 32 positions before a window of 4, and other prompts write over them."""
    small = on_engine("gemma3_text", block_size=32, num_gpu_blocks_override=12, **SMALL)
    ids = prompts(40, 9, 50, 33)
    found: list[tuple[int, int, Tensor, Tensor | None]] = []
    with small.generate(ids, max_new_tokens=4, ignore_eos=True) as tracer:
        for _ in tracer.iter[:]:
            requests, ends, seq = small.requests, small.attention_mask.sum(1).tolist(), small.input_size[1]
            gone = max(ends) - seq > 40  # in a step of parts of prompts, what is before a row does not show
            if gone:
                with pytest.raises(NotInThisModelError, match="a window of 4, and the engine has let go of blocks"):
                    small.values[2]
            keys = None if gone or max(ends) > 32 else small.keys[2]
            pattern = small.attention_probabilities[2]
            for row, request in enumerate(requests):
                found.append((request, ends[row], pattern[row, :, -1], None if keys is None else keys[row]))
        outputs = tracer.result
    assert {keys is None for *_, keys in found} == {True, False}
    given: list[Tensor] = []
    with hooked(small.layers[2].module.self_attn.attn, lambda args, *_: given.append(args[1].clone())):
        for one, output in zip(ids, outputs, strict=True):
            given.clear()
            whole = [*one, *output.outputs[0].token_ids[:3]]
            plainly(small, [whole])
            with torch.no_grad():
                theirs = in_transformers("gemma3_text")(torch.tensor([whole]), output_attentions=True).attentions[2][0]
            for request, end, pattern, keys in found:
                if ids[request] == one:
                    assert_near(pattern[:, -end:], theirs[:, end - 1, :end])
                    if keys is not None:
                        assert_near(keys[0, -end:], torch.cat(given)[:end])


def test_rows_are_prompts_whatever_the_engine_schedules() -> None:
    """More prompts than a step takes, longer than a step's tokens, ending at different times: each position's value is right."""
    small = on_engine("llama", **SMALL)
    ids = prompts(3, 20, 5, 9, 1, 30, 7)
    params = [
        small.engine.vllm.SamplingParams(temperature=0, max_tokens=2 + i, ignore_eos=True) for i in range(len(ids))
    ]
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(ids))}
    batches = set()
    with small.generate(ids, sampling_params=params) as tracer:
        for _ in tracer.iter[:]:
            requests = small.requests
            size = small.input_size
            lengths = (small.input_ids >= 0).sum(1)  # of all columns, padding too
            stream = small.layers_input[2]
            mask = small.attention_mask
            assert stream.shape[:2] == size == (len(requests), lengths[0])
            assert requests == tuple(sorted(requests))
            for row, request in enumerate(requests):
                new = int(mask[row].sum()) - sum(len(one) for one in found[request])
                found[request].append(stream[row, stream.shape[1] - new :])
            batches.add(len(requests))
        outputs = tracer.result
    assert max(batches) <= 4
    assert len(found[5]) > 5 + 2, "the longest prompt takes several steps"
    for i, prompt in enumerate(ids):
        tokens = list(outputs[i].outputs[0].token_ids)
        assert len(tokens) == 2 + i
        assert tokens == written(prompt, 2 + i)
        assert_near(torch.cat(found[i]), hidden_states("llama", [*prompt, *tokens[:-1]])[2][0])


def test_a_request_that_is_put_back_and_computed_again() -> None:
    """The cache has room for three blocks of 32 tokens: one of two prompts has to give its blocks to the other for a while."""
    tight = on_engine("llama", num_gpu_blocks_override=4, block_size=32)
    ids = prompts(28, 30)
    seen: list[tuple[int, ...]] = []
    columns: list[int] = []
    found: dict[tuple[int, int], Tensor] = {}
    with tight.generate(ids, max_new_tokens=10, ignore_eos=True) as tracer:
        for _ in tracer.iter[:]:
            seen.append(tight.requests)
            columns.append(tight.input_size[1])
            stream, so_far = tight.layers_input[2], tight.attention_mask.sum(1)
            given = tight.input_ids
            keys = tight.keys[2]
            assert keys.shape[2] == so_far.max()
            for row, request in enumerate(tight.requests):
                whole = [*ids[request], *written(ids[request], 10)]
                end = int(so_far[row])
                count = min(end, stream.shape[1])
                assert given[row, -count:].tolist() == whole[end - count : end]
                for k in range(count):
                    found[request, end - 1 - k] = stream[row, -1 - k]
        outputs = tracer.result
    assert (0,) in seen, "one has waited while the other was computed"
    assert max(columns[5:]) > 30, "one has been computed again, with what it had written"
    for i, prompt in enumerate(ids):
        tokens = list(outputs[i].outputs[0].token_ids)
        assert tokens == written(prompt, 10)
        theirs = hidden_states("llama", [*prompt, *tokens[:-1]])[2][0]
        assert_near(torch.stack([found[i, k] for k in range(len(theirs))]), theirs)


def test_steering_a_generation_is_what_a_hook_does_in_transformers() -> None:
    ids, direction = prompts(4, 9, 4), 3 * torch.randn(64, generator=torch.Generator().manual_seed(2))

    def steer() -> None:
        model().layers_output[1] = model().layers_output[1] + direction

    steered = model().edit(steer)
    mine = [
        list(output.outputs[0].token_ids) for output in steered.generate(ids, max_new_tokens=5, ignore_eos=True).run()
    ]
    plain = plainly(model(), ids, 5, ignore_eos=True)
    with hooked(in_transformers("llama").model.layers[1], lambda args, kwargs, output: output + direction):
        theirs = [written(one, 5) for one in ids]
    assert mine == theirs != plain
    assert [written(one, 5) for one in ids] == plain == plainly(model(), ids, 5, ignore_eos=True)


def test_steering_acts_in_parts_of_prompts_and_mixed_steps() -> None:
    small = on_engine("llama", **SMALL)
    ids, direction = prompts(20, 3, 9, 5, 30), 3 * torch.randn(64, generator=torch.Generator().manual_seed(2))

    def steer() -> None:
        small.layers_output[1] += direction

    mine = [
        list(one.outputs[0].token_ids)
        for one in small.edit(steer).generate(ids, max_new_tokens=4, ignore_eos=True).run()
    ]
    with hooked(in_transformers("llama").model.layers[1], lambda args, kwargs, output: output + direction):
        assert mine == [written(one, 4) for one in ids]


def test_an_attached_module_acts_in_every_step() -> None:
    double = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.eye_(double.weight)
    double.weight.data *= 1.5
    ids = prompts(4, 6)
    attached = model().attach("layers_output[0]", double, name="double")
    mine = [list(one.outputs[0].token_ids) for one in attached.generate(ids, max_new_tokens=4, ignore_eos=True).run()]
    with hooked(in_transformers("llama").model.layers[0], lambda args, kwargs, output: 1.5 * output):
        assert mine == [written(one, 4) for one in ids]
    with attached.trace(ids):
        inside = attached.double.output
        assert inside.shape == (10, 64)


def test_a_module_that_fails_leaves_the_engine_free() -> None:
    class Fails(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError(f"{len(x)} tokens")

    with pytest.raises(ZeroDivisionError, match="10 tokens"):
        model().attach("layers_output[1]", Fails()).generate(prompts(4, 6), max_new_tokens=3).run()
    assert not model().engine.is_busy
    assert plainly(model(), prompts(4, 6), 3, ignore_eos=True) == [written(one, 3) for one in prompts(4, 6)]


def test_steer_is_an_edit_of_these_prompts() -> None:
    ids, direction = prompts(4, 9, 4), 3 * torch.randn(64, generator=torch.Generator().manual_seed(2))

    def texts(edit: Any) -> list[list[int]]:
        return [
            list(one.outputs[0].token_ids)
            for one in model().edit(edit).generate(ids, max_new_tokens=4, ignore_eos=True).run()
        ]

    def by_hand() -> None:
        model().layers_output[0] += 2 * direction
        model().layers_output[2] += 2 * direction

    plain = plainly(model(), ids, 4, ignore_eos=True)
    steered = texts(by_hand)
    assert texts(lambda: model().steer([0, 2], direction, 2.0)) == steered != plain
    assert texts(lambda: model().steer([0, 2], direction, 2.0, requests=[0, 2])) == [steered[0], plain[1], steered[2]]
    with (
        model().trace(ids),
        pytest.raises(
            InputError, match=r"steering vector is of shape \(63,\), the model's residual stream of width 64"
        ),
    ):
        model().steer(1, torch.zeros(63))
    with model().trace(ids), pytest.raises(InputError, match="entries that are NaN or infinite"):
        model().steer(1, torch.full((64,), torch.nan))
    with model().trace(ids), pytest.raises(InputError, match=r"of shape \(1, 64\): a step has tokens of all prompts"):
        model().steer(1, torch.zeros(1, 64))
    with model().trace(ids), pytest.raises(InputError, match="layers=True: True is no number of a layer"):
        model().steer(True, torch.zeros(64))
    with model().trace(ids), pytest.raises(InputError, match="that is a mask"):
        model().steer(1, torch.zeros(64), requests=[True, False])


def test_an_edit_of_keys_is_of_its_step_alone() -> None:
    ids = prompts(5, 8)
    with model().generate(ids, max_new_tokens=3, ignore_eos=True) as tracer:
        for _ in tracer.iter[0]:
            model().keys[1] = 0 * model().keys[1]
            model().values[1] *= 2
        for _ in tracer.iter[1]:
            later = model().keys[1], model().values[1]
    with model().generate(ids, max_new_tokens=3, ignore_eos=True) as tracer:
        for _ in tracer.iter[0]:
            first = model().keys[1], model().values[1]
    for one, other in zip(first, later, strict=True):
        assert torch.equal(other[0, :, 3:8], one[0, :, 3:])
        assert torch.equal(other[1, :, :8], one[1])
        assert other[1].any()


def test_keys_of_earlier_steps_are_not_written() -> None:
    with model().generate(prompts(5), max_new_tokens=2, ignore_eos=True) as tracer:
        for _ in tracer.iter[1]:
            with pytest.raises(
                AssignmentError, match="in a later step those of the earlier positions are in the engine's cache"
            ):
                model().keys[1] = model().keys[1]


def test_a_token_can_be_put_in_the_place_of_the_sampled_one() -> None:
    with model().generate(prompts(5, 6), max_new_tokens=3, ignore_eos=True) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                model().sampled_tokens = torch.tensor([50, 60])
        outputs = tracer.result
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert [row[1] for row in tokens] == [50, 60]
    first = [row[0] for row in tokens]
    after = [
        written([*prompt, token, forced], 1)[0]
        for prompt, token, forced in zip(prompts(5, 6), first, (50, 60), strict=True)
    ]
    assert [row[2] for row in tokens] == after


@pytest.mark.parametrize(
    ("given", "tokens", "text"),
    [
        ({}, [50, 97], r"sampled_tokens: 97 is outside of the model's vocabulary of 97 \(0 to 96\)"),
        ({}, [-1, 50], "sampled_tokens: -1 is outside"),
        ({"logprobs": 1}, [50, 60], "the engine has already made logprobs, of the tokens that it has sampled"),
    ],
)
def test_tokens_that_cannot_be_put_there(given: dict[str, Any], tokens: list[int], text: str) -> None:
    with (
        pytest.raises(AssignmentError, match=text),
        model().generate(prompts(5, 6), max_new_tokens=3, ignore_eos=True, **given) as tracer,
    ):
        for _ in tracer.iter[:]:
            model().sampled_tokens = model().sampled_tokens
            model().sampled_tokens = torch.tensor(tokens)
    assert not model().engine.is_busy


def test_sampling_parameters_are_the_engines() -> None:
    ids = prompts(5, 6, 7)
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "seed": 7, "ignore_eos": True}
    mine = model().generate(ids, max_new_tokens=6, **options).run()
    assert [list(one.outputs[0].token_ids) for one in mine] == plainly(model(), ids, 6, **options)
    assert len(model().generate(ids, max_new_tokens=3, logprobs=2, ignore_eos=True).run()[0].outputs[0].logprobs) == 3
    assert plainly(model(), ids, 6, **options) != plainly(model(), ids, 6, **{**options, "seed": 8})


def test_an_output_is_of_all_tokens_whatever_kind_is_asked_for() -> None:
    ids = prompts(5, 6)
    for kind in model().engine.vllm.sampling_params.RequestOutputKind:
        made = model().engine.vllm.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, output_kind=kind)
        for given in ({"sampling_params": made}, {"max_new_tokens": 4, "ignore_eos": True, "output_kind": kind}):
            found = [list(one.outputs[0].token_ids) for one in model().generate(ids, **given).run()]
            assert found == [written(one, 4) for one in ids]


def test_a_prompt_that_has_ended_is_no_row_any_more() -> None:
    params = [model().engine.vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 3, 2)]
    with model().generate(prompts(4, 4, 4), sampling_params=params) as tracer:
        seen = [model().requests for _ in tracer.iter[:]]
    assert seen == [(0, 1, 2), (1, 2), (1,)]


def test_a_generation_that_is_left_leaves_the_engine_free() -> None:
    ids = prompts(4, 6)
    for step in (0, 1, 2):
        with model().generate(ids, max_new_tokens=8, ignore_eos=True) as tracer:
            for _ in tracer.iter[step]:
                model().layers_output[1]
        assert not model().engine.is_busy
    with pytest.raises(ZeroDivisionError), model().generate(ids, max_new_tokens=8, ignore_eos=True) as tracer:
        for _ in tracer.iter[:]:
            model().logits
            1 / 0
    assert plainly(model(), ids, 3, ignore_eos=True) == [written(one, 3) for one in ids]


def test_what_is_wrong_is_said_at_the_line() -> None:
    ids = prompts(5)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 0}, "max_new_tokens=0: it is a whole number, 1 or more"),
        ({"do_sample": True}, r"do_sample=True: with the engine give temperature=1.0 samples"),
        (
            {"temprature": 1},
            r"temprature=1: it is no argument of generate, and none of vllm.SamplingParams. Did you mean temperature",
        ),
        ({"temperature": -1.0}, "vLLM refuses these sampling parameters: temperature must be non-negative"),
        ({"n": 2}, "n=2: a row is one sequence of a prompt. Give the prompt 2 times"),
        ({"sampling_params": 3}, "sampling_params=3: give a vllm.SamplingParams"),
        ({"sampling_params": model().engine.vllm.SamplingParams(), "top_p": 0.5}, "top_p: sampling_params says that"),
    ]
    cases += [({name: ["a"]}, f"{name}: the engine has no tokenizer") for name in ("stop", "bad_words")]
    for given, text in cases:
        with pytest.raises(InputError, match=text):
            model().generate(ids, **given)
    for given, text in (({"logprobs": 50}, "logprobs of 50"), ({"allowed_token_ids": [97]}, "out-of-vocab")):
        with pytest.raises(InputError, match=f"vLLM refuses prompt 0 with its sampling parameters: .*{text}"):
            model().generate(ids, max_new_tokens=1, **given).run()
    with pytest.raises(InputError, match="position_ids: the engine makes its own"):
        model().trace(torch.tensor(ids), position_ids=torch.tensor([[4, 3, 2, 1, 0]]))
    with pytest.raises(
        InputError, match="Prompt 1 has 64 tokens, and the engine takes fewer than its max_model_len, 64"
    ):
        model().trace(prompts(5, 64))
    small = on_engine("llama", **SMALL)
    with pytest.raises(
        InputError,
        match=r"The prompts have 20 tokens, and one step of the engine takes 16: .*max_num_batched_tokens=20",
    ):
        small.trace(prompts(10, 10))
    with pytest.raises(InputError, match=r"There are 5 prompts, and one step of the engine takes 4: .*max_num_seqs=5"):
        small.trace(prompts(1, 1, 1, 1, 1))
    with small.generate(prompts(20), max_new_tokens=1) as tracer:
        for _ in tracer.iter[0]:
            with pytest.raises(InputError, match="sampled_tokens: this step computes a part of prompt 0 alone"):
                small.sampled_tokens
    with model().trace(ids):
        model().layers_input[0]
        with pytest.raises(UsageError, match="The engine is at work on other requests: it runs one trace at a time"):
            model().trace(ids)
    with pytest.raises(UsageError, match="no block for each: give them as a list"), model().trace(ids) as tracer:
        tracer.invoke("x")
    with pytest.raises(UsageError, match="scan: the engine's kernels compute"):
        model().scan(ids)
