"""Generation under edits, every step of it, as docs/generation.md defines it.

The reference has no cache, no steps and nothing of ours: one plain forward pass over the whole sequence that was
generated, with a hook of PyTorch's that edits the positions which the definition names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from architectures import PLACES, build, prompt_ids
from reference import edited
from torch import Tensor
from transformers import DynamicCache

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs import takes

TYPES = ("gpt2", "llama", "gemma2", "bloom", "gpt_oss", "mpt")
every_type = pytest.mark.parametrize("model_type", TYPES)
STEPS, LAYER, N = 5, 0, 7
GENERATE: dict[str, Any] = {
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
    "do_sample": False,
    "pad_token_id": 0,
    "use_cache": True,  # not MPT's default
}
VECTOR = torch.linspace(-2, 2, 32, dtype=torch.float64)
#: Masks of double precision overflow in the single-precision softmax of Gemma 2, Bloom and MPT: padding gives NaN there.
PADDED = torch.float32
Edit = Callable[[Tensor, list[int]], None]


@pytest.fixture(autouse=True)
def softmax_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bloom and Gemma 2 ask for single precision, in which the sum's rounding depends on the number of keys, and on the
    processor. (MPT converts before it asks, so that it stays in single precision.)"""
    softmax = Tensor.softmax

    def precise(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(scores, dim, dtype=torch.promote_types(scores.dtype, dtype or scores.dtype))

    monkeypatch.setattr(Tensor, "softmax", precise)


@functools.cache
def loaded(model_type: str, dtype: torch.dtype = torch.float64) -> StandardizedTransformer:
    """In double precision, where a cached pass and an uncached one differ by next to nothing."""
    hf = build(model_type).to(dtype)
    if model_type == "gpt_oss":
        hf.set_experts_implementation("eager")  # the other has no double precision
    return StandardizedTransformer(hf)


def add_vector(hidden: Tensor, positions: list[int]) -> None:
    hidden[:, positions] += VECTOR


def forward(
    model: StandardizedTransformer, sequences: Tensor, positions: Iterable[int] = (), edit: Edit = add_vector
) -> Tensor:
    """The logits of one plain pass over whole sequences, edited at these positions of one layer's output."""
    hf, at = model.hf_model, list(positions)
    layer = hf.get_submodule(PLACES[hf.config.model_type][0])[LAYER]

    def change(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        edit(hidden, [p for p in at if p < hidden.shape[1]])
        return hidden

    return edited(lambda: hf(sequences, use_cache=False).logits, layer, "output", change)


@contextmanager
def recorded(model: StandardizedTransformer) -> Iterator[list[Tensor]]:
    """The logits of the last position in every step. (What `generate` itself can return is rounded to float32.)"""
    steps: list[Tensor] = []
    handle = model.hf_model.register_forward_hook(lambda _, __, output: steps.append(output.logits[:, -1]))
    try:
        yield steps
    finally:
        handle.remove()


def check(model: StandardizedTransformer, steps: list[Tensor], logits: Tensor, n: int = N) -> None:
    """The logits of every step are those of the position before the token that the step chose."""
    single = model.hf_model.dtype == torch.float32 or model.config.model_type == "mpt"
    tolerance = 1e-5 * max(1.0, float(logits.abs().max())) if single else 1e-9
    assert len(steps) == STEPS
    torch.testing.assert_close(torch.stack(steps, 1), logits[:, n - 1 : n - 1 + STEPS], rtol=0, atol=tolerance)


def differs(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, atol=1e-3)


# What the block does in each step, and the positions that are edited thereby.
STEERING: dict[str, tuple[slice, int | list[int] | None, Iterable[int]]] = {
    "in every step": (slice(None), None, range(N + STEPS)),
    "from step 2 on": (slice(2, None), None, range(N + 1, N + STEPS)),
    "in step 0 alone": (slice(0, 1), None, range(N)),
    "in step 3 alone": (slice(3, 4), None, [N + 2]),
    "at position 2": (slice(0, 1), 2, [2]),
    "at positions 0 and 4": (slice(0, 1), [0, 4], [0, 4]),
    "at the newest in every step": (slice(None), -1, range(N - 1, N + STEPS)),
}


@every_type
@pytest.mark.parametrize("case", list(STEERING))
def test_steering_with_the_cache(model_type: str, case: str) -> None:
    model, ids = loaded(model_type), prompt_ids(2, N)
    steps, where, positions = STEERING[case]
    seen = []
    with torch.no_grad(), recorded(model) as logits, model.generate(ids, **GENERATE) as tracer:
        for step in tracer.iter[steps]:
            assert model.input_size == (2, 1 if step else N)
            model.steer(LAYER, VECTOR, token_positions=where)
            seen.append(model.logits[:, -1])
        sequences = tracer.result
    expected = forward(model, sequences, positions)
    check(model, logits, expected)
    assert all(torch.equal(*both) for both in zip(seen, logits[steps], strict=True))
    plain = forward(model, sequences)
    first = min(positions)
    assert differs(expected[:, max(first, N - 1) :], plain[:, max(first, N - 1) :])
    assert torch.equal(expected[:, :first], plain[:, :first])


@every_type
@pytest.mark.parametrize("name", ["layers_output", "layers_input", "attentions_output", "mlps_output"])
@pytest.mark.parametrize(("step", "position"), [(0, 2), (3, N + 2)])
def test_patching_from_another_run(model_type: str, name: str, step: int, position: int) -> None:
    model, ids = loaded(model_type), prompt_ids(2, N)
    hf = model.hf_model
    with torch.no_grad():
        with model.trace(prompt_ids(2, N, seed=5)):
            value = getattr(model, name)[LAYER][:, 3]
        with recorded(model) as logits, model.generate(ids, **GENERATE) as tracer:
            for _ in tracer.iter[step]:
                getattr(model, name)[LAYER][:, position if step == 0 else -1] = value
            sequences = tracer.result
        what, kind = name.split("_")
        path, attention, mlp = PLACES[model_type]
        child = {"layers": "", "attentions": attention, "mlps": mlp}[what]
        module = hf.get_submodule(path)[LAYER].get_submodule(child)

        def patch(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            hidden[:, position] = value
            return hidden

        expected = edited(lambda: hf(sequences, use_cache=False).logits, module, kind, patch)
        check(model, logits, expected)
        assert differs(expected[:, N - 1 :], forward(model, sequences)[:, N - 1 :])


@every_type
@pytest.mark.parametrize(
    "case", ["in every step", "in step 0 alone", "from step 2 on", "at position 2", "at position 2 in step 0"]
)
def test_without_the_cache_an_edit_lasts_for_its_step(model_type: str, case: str) -> None:
    model, ids = loaded(model_type), prompt_ids(2, N)
    steps = {
        "in step 0 alone": slice(0, 1),
        "from step 2 on": slice(2, None),
        "at position 2 in step 0": slice(0, 1),
    }.get(case, slice(None))
    where = 2 if "position 2" in case else None
    with (
        torch.no_grad(),
        recorded(model) as logits,
        model.generate(ids, **{**GENERATE, "use_cache": False}) as tracer,
    ):
        for step in tracer.iter[steps]:
            assert model.input_size == (2, N + step)
            model.steer(LAYER, VECTOR, token_positions=where)
        sequences = tracer.result
    whole = range(N + STEPS) if where is None else [where]
    with_edit, plain = forward(model, sequences, whole), forward(model, sequences)
    expected = plain.clone()
    for step in range(STEPS)[steps]:
        expected[:, N - 1 + step] = with_edit[:, N - 1 + step]
    check(model, logits, expected)
    assert differs(with_edit[:, N - 1 :], plain[:, N - 1 :])


@every_type
def test_a_lasting_edit(model_type: str) -> None:
    model, ids = loaded(model_type), prompt_ids(2, N)
    everywhere = model.edit(lambda: model.steer(LAYER, VECTOR))
    newest = model.edit(lambda: model.steer(LAYER, VECTOR, token_positions=-1))
    for view, positions in ((everywhere, range(N + STEPS)), (newest, range(N - 1, N + STEPS))):
        with torch.no_grad(), recorded(model) as logits:
            sequences = view.generate(ids, **GENERATE).run()
        check(model, logits, forward(model, sequences, positions))
    # And an edit of the block's own, after it.
    with torch.no_grad(), recorded(model) as logits, newest.generate(ids, **GENERATE) as tracer:
        for _ in tracer.iter[2:]:
            newest.steer(LAYER, VECTOR)
        sequences = tracer.result

    def both(hidden: Tensor, positions: list[int]) -> None:
        add_vector(hidden, positions)
        add_vector(hidden, [p for p in positions if p >= N + 1])

    check(model, logits, forward(model, sequences, range(N - 1, N + STEPS), both))


@every_type
def test_prompts_of_unequal_length_in_one_batch(model_type: str) -> None:
    """Padded on the left: a position counted from the end is the same in every prompt."""
    model = loaded(model_type, PADDED)
    long, short = prompt_ids(1, N)[0].tolist(), prompt_ids(1, 4, seed=1)[0].tolist()
    with torch.no_grad(), recorded(model) as logits, model.generate([long, short], **GENERATE) as tracer:
        for step in tracer.iter[:3]:
            model.steer(LAYER, VECTOR, token_positions=-1 if step else -3)
        sequences = tracer.result
    for row, prompt in ((0, long), (1, short)):
        n = len(prompt)
        alone = sequences[row : row + 1, N - n :]
        check(model, [step[row : row + 1] for step in logits], forward(model, alone, [n - 3, n, n + 1]), n)


@every_type
def test_blocks_with_prompts_of_unequal_length(model_type: str) -> None:
    """Each counts positions in its own prompt, and edits in its own steps."""
    model = loaded(model_type, PADDED)
    prompts = [prompt_ids(1, length, seed=length) for length in (N, 4, 5)]
    with torch.no_grad():
        with model.trace(prompt_ids(1, N, seed=9)):
            value = model.layers_output[LAYER][:, 2]
        with recorded(model) as logits, model.generate(**GENERATE) as tracer:
            with tracer.invoke(prompts[0]):
                for _ in tracer.iter[:]:
                    model.steer(LAYER, VECTOR)
                every = tracer.result
            with tracer.invoke(prompts[1]):
                model.layers_output[LAYER][:, 2] = value
                patched = tracer.result
            with tracer.invoke(prompts[2]):
                for _ in tracer.iter[2:]:
                    model.steer(LAYER, VECTOR)
                late = tracer.result

    def patch(hidden: Tensor, positions: list[int]) -> None:
        hidden[:, positions] = value[:, None]

    blocks = (
        (every, range(N + STEPS), add_vector),
        (patched, [2], patch),
        (late, range(5 + 1, 5 + STEPS), add_vector),
    )
    for row, (whole, positions, edit) in enumerate(blocks):
        n = prompts[row].shape[1]
        sequences = whole[:, -(n + STEPS) :]
        assert torch.equal(sequences[:, :n], prompts[row])
        expected = forward(model, sequences, positions, edit)
        check(model, [step[row : row + 1] for step in logits], expected, n)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_blocks_of_unequal_length_see_no_padding_in_any_cache(model_type: str, cache: str | None) -> None:
    """A static cache has places for later positions, and a window lets go of the first: the padding is where it is."""
    hf = build(model_type, dtype=PADDED, **({"sliding_window": 4} if model_type != "llama" else {}))
    model = StandardizedTransformer(hf)
    prompts = [prompt_ids(1, length, seed=length) for length in (N, 4)]
    layers = range(model.num_layers)
    seen: dict[int, list[list[Tensor]]] = {0: [], 1: []}

    def look(block: int) -> Callable[[], Tensor]:
        def body() -> Tensor:
            for step in tracer.iter[:]:
                patterns = []
                for layer in layers:
                    values = model.values[layer]
                    patterns.append(model.attention_probabilities[layer].clone())
                    if step == STEPS - 1:  # each head takes what the first key's position says, and nothing else
                        only = torch.zeros_like(patterns[-1])
                        only[..., 0] = 1
                        model.attention_probabilities[layer] = only
                        first = values[:, :, :1].repeat_interleave(model.num_heads // values.shape[1], 1)
                        close(model.heads_output[layer], first.transpose(1, 2))
                seen[block].append(patterns)
            return tracer.result

        return body

    def close(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)

    with torch.no_grad():
        with model.generate(**GENERATE, cache_implementation=cache) as tracer:
            invokes = [tracer.invoke(prompt, look(block)) for block, prompt in enumerate(prompts)]
        hf.set_attn_implementation("eager")
        for block, prompt in enumerate(prompts):
            n = prompt.shape[1]
            sequence = invokes[block].value[:, -(n + STEPS) :]
            assert torch.equal(sequence[:, :n], prompt)
            for step, patterns in enumerate(seen[block][:-1]):
                plain = hf(sequence[:, : n + step], use_cache=False, output_attentions=True).attentions
                for pattern, expected in zip(patterns, plain, strict=True):
                    expected, width = expected[:, :, -pattern.shape[2] :], pattern.shape[3]
                    close(pattern[..., : n + step], expected[..., -width:])
                    assert not pattern[..., n + step :].any()
                    assert not expected[..., :-width].any()


@every_type
def test_blocks_of_unequal_length_without_the_cache(model_type: str) -> None:
    """Every step has all positions of a block's own prompt, and none of the padding."""
    model = loaded(model_type, PADDED)
    prompts = [prompt_ids(1, length, seed=length) for length in (N, 4)]
    seen: dict[int, list[tuple[Tensor, ...]]] = {0: [], 1: []}

    def look(block: int) -> Callable[[], Tensor]:
        def body() -> Tensor:
            for _ in tracer.iter[:]:
                values = (model.layers_input[1], model.attention_probabilities[1], model.layers_output[1])
                seen[block].append(tuple(value.clone() for value in values))
            return tracer.result

        return body

    with torch.no_grad():
        with model.generate(**{**GENERATE, "use_cache": False, "max_new_tokens": 3, "min_new_tokens": 3}) as tracer:
            invokes = [tracer.invoke(prompt, look(block)) for block, prompt in enumerate(prompts)]
        for block, prompt in enumerate(prompts):
            n = prompt.shape[1]
            sequence = invokes[block].value[:, -(n + 3) :]
            assert torch.equal(sequence[:, :n], prompt)
            for step, (before, pattern, after) in enumerate(seen[block]):
                with model.trace(sequence[:, : n + step], use_cache=False):
                    torch.testing.assert_close(before, model.layers_input[1], rtol=0, atol=1e-3)
                    torch.testing.assert_close(pattern, model.attention_probabilities[1], rtol=0, atol=1e-3)
                    torch.testing.assert_close(after, model.layers_output[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_keys_and_values_that_are_kept_stay_as_they_were(model_type: str, cache: str | None) -> None:
    """A static cache writes those of later steps into the same memory."""
    model = StandardizedTransformer(build(model_type, dtype=PADDED))
    kept: list[Tensor] = []
    then: list[Tensor] = []
    with torch.no_grad(), model.generate(prompt_ids(1, N), **GENERATE, cache_implementation=cache) as tracer:
        for _ in tracer.iter[:]:
            for layer in range(model.num_layers):
                for names in (model.keys, model.values):
                    kept.append(names[layer])
                    then.append(kept[-1].clone())
    assert len(kept) == 2 * model.num_layers * STEPS
    for now, before in zip(kept, then, strict=True):
        assert torch.equal(now, before)


@every_type
def test_blocks_with_several_sequences_for_a_prompt(model_type: str) -> None:
    """A block's rows are those of all its prompt's sequences, in hidden states, ids and the result."""
    model = loaded(model_type)
    prompts = [prompt_ids(1, N, seed=seed) for seed in (1, 2)]
    sampled = {**GENERATE, "do_sample": True, "num_return_sequences": 3, "temperature": 3.0}
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {0: [], 1: []}

    def look(block: int) -> Callable[[], Tensor]:
        def body() -> Tensor:
            for _ in tracer.iter[:]:
                seen[block].append((model.input_ids, model.layers_output[LAYER]))
            return tracer.result

        return body

    torch.manual_seed(3)
    with torch.no_grad(), model.generate(**sampled) as tracer:
        invokes = [tracer.invoke(prompt, look(block)) for block, prompt in enumerate(prompts)]
    torch.manual_seed(3)
    with torch.no_grad():
        expected = model.hf_model.generate(torch.cat(prompts), **sampled)
    for block, invoke in enumerate(invokes):
        mine = expected[3 * block : 3 * block + 3]
        assert torch.equal(invoke.value, mine)
        assert len({tuple(row) for row in mine.tolist()}) > 1
        for step, (ids, hidden) in enumerate(seen[block]):
            first, last = (N - 1 + step if step else 0), N + step
            assert torch.equal(ids, mine[:, first:last])
            own = torch.ones_like(mine[:, :last])  # also where the token of padding has been drawn
            with torch.no_grad(), model.trace(mine[:, :last], attention_mask=own):
                torch.testing.assert_close(hidden, model.layers_output[LAYER][:, first:], rtol=0, atol=1e-4)


@every_type
def test_several_sequences_for_a_prompt_are_rows_next_to_each_other(model_type: str) -> None:
    model, ids = loaded(model_type), prompt_ids(2, N)
    sampled = {**GENERATE, "do_sample": True, "num_return_sequences": 2, "temperature": 3.0}
    torch.manual_seed(3)
    with torch.no_grad(), recorded(model) as logits, model.generate(ids, **sampled) as tracer:
        for step in tracer.iter[:]:
            assert model.input_size == (4, 1 if step else N)
            model.steer(LAYER, VECTOR, batch_index=1)  # the second sequence of the first prompt
        sequences = tracer.result
    assert torch.equal(sequences[:, :N], ids.repeat_interleave(2, 0))

    def second(hidden: Tensor, positions: list[int]) -> None:
        hidden[1] += VECTOR

    check(model, logits, forward(model, sequences, [], second))


@every_type
def test_an_edit_goes_with_its_beam(model_type: str) -> None:
    """The scores of the beams are those of whole sequences under the edit, however they were reordered."""
    model, ids = loaded(model_type), prompt_ids(2, N)
    beams = {**GENERATE, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    beams |= {"return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad(), model.generate(ids, **beams) as tracer:
        for step in tracer.iter[:]:
            assert model.input_size == (6, 1 if step else N)
            model.steer(LAYER, VECTOR, token_positions=-1)
        result = tracer.result
    assert result.beam_indices[:, :STEPS].diff(dim=1).any()  # else nothing has been reordered
    chosen = result.sequences[:, N:, None]

    def scores(logits: Tensor) -> Tensor:
        return logits[:, N - 1 : -1].log_softmax(-1).gather(-1, chosen).sum((1, 2))

    expected = scores(forward(model, result.sequences, range(N - 1, N + STEPS)))
    torch.testing.assert_close(result.sequences_scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert differs(expected, scores(forward(model, result.sequences)))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # of newer and older releases: each takes both
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "bloom", "gemma3_text", "falcon", "gpt_neox"])
def test_a_prompt_that_goes_on_from_a_cache(model_type: str, name: str) -> None:
    hf = build(model_type)
    model, ids = StandardizedTransformer(hf), prompt_ids()
    full = hf(ids, use_cache=False).logits[:, -2:]

    def cache(name: str = name) -> dict[str, Any]:
        past = DynamicCache(config=hf.config)
        hf(ids[:, :-2], **{own_name: past}, use_cache=True)
        return {name: past, "use_cache": True}

    own_name = next(name for name in ("cache", "past_key_values") if takes(hf, name))
    with torch.no_grad():
        expected = hf(ids[:, -2:], **cache(own_name), attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(expected, full, atol=1e-4)
        with model.trace(ids[:, -2:], **cache()):
            traced = model.logits
        called = model({"input_ids": ids[:, -2:], **cache()}).logits
        with model.trace(ids[:, -2:], **cache()):
            pattern = model.attention_probabilities[0]
        with model.trace(ids):
            whole = model.attention_probabilities[0]
        generated = model.generate(ids, **cache(), max_new_tokens=3, do_sample=False).run()
        plain = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(traced, expected)
    assert torch.equal(called, expected)
    keys = pattern.shape[-1]  # of a window fewer
    assert torch.allclose(pattern, whole[..., -2:, -keys:], atol=1e-5)
    assert torch.equal(generated, plain)


@pytest.mark.parametrize("layers", [(0, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
def test_layers_skipped_in_every_step_of_a_padded_batch(name: str, layers: tuple[int, int]) -> None:
    """With a KV cache, whose length the model takes from its first layer; without; and the short prompt alone."""
    edited_view = StandardizedTransformer(name).edit(lambda: edited_view.skip_layers(*layers))
    prompts = ["The capital of France is", "Japan is in"]

    def new(prompts: Any, **kwargs: Any) -> list[int]:
        tokens = edited_view.generate(prompts, max_new_tokens=6, do_sample=False, **kwargs).run()
        return tokens[-1, -6:].tolist()

    assert new(prompts) == new(prompts, use_cache=False) == new(prompts[1:])
    with edited_view.without_edits().generate(prompts, max_new_tokens=3) as tracer:
        for step in tracer.iter[:]:
            if step == 0:
                edited_view.skip_layer(0)
            else:
                logits = edited_view.logits
    assert logits.isnan().any()  # a layer that was skipped runs: it has no keys of the prompt
