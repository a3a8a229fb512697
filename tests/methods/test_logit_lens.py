"""The logit lens against the same computed with plain hooks."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import encoder_decoders
import pytest
import torch
from architectures import PLACES, TYPES, prompt_ids, shared
from reference import edited, hooked
from torch import Tensor
from torch.overrides import TorchFunctionMode
from zoo.build import ids as zoo_ids
from zoo.build import shared as zoo_shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.methods import Prompt, lens_statistics, logit_lens
from nnatomy.standardized.positions import positions_from_end

SOME = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "opt")
HYBRIDS = ("falcon_h1", "jamba", "lfm2", "qwen3_next")
demo = functools.cache(lambda: StandardizedTransformer("demo:llama"))
wrapped = functools.cache(lambda model_type: StandardizedTransformer(shared(model_type)))


def naive_logits(hf: Any, layers: list[Any], ids: Tensor) -> Tensor:
    """(prompt, layer, position, vocab): each layer's output put in the last layer's place, by a plain hook."""
    hidden = hooked(hf, lambda: hf(ids), {i: (layer, "output") for i, layer in enumerate(layers)})
    rows = [
        edited(lambda: hf(ids), layers[-1], "output", lambda _, i=i: hidden[i]).logits  # type: ignore[misc]
        for i in range(len(layers))
    ]
    return torch.stack(rows, dim=1)


def layers_of(model_type: str) -> list[Any]:
    return list(shared(model_type).get_submodule(PLACES[model_type][0]))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_each_row_is_the_models_prediction_were_that_layer_its_last(model_type: str) -> None:
    ids = prompt_ids()
    expected = naive_logits(shared(model_type), layers_of(model_type), ids)[:, :, -1]
    probs = logit_lens(wrapped(model_type), ids)
    assert probs.shape == expected.shape
    assert torch.allclose(probs, expected.softmax(-1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_hybrids(model_type: str) -> None:
    hf = zoo_shared(model_type)
    model, ids = StandardizedTransformer(hf), zoo_ids(hf)
    layers = [view.module for view in model.layers]
    close(logit_lens(model, ids), naive_logits(hf, layers, ids)[:, :, -1].softmax(-1))


@pytest.mark.parametrize("model_type", SOME)
def test_outputs_and_positions(model_type: str) -> None:
    model, ids = wrapped(model_type), prompt_ids()
    expected = naive_logits(shared(model_type), layers_of(model_type), ids)
    close(logit_lens(model, ids, output="logits"), expected[:, :, -1])
    close(logit_lens(model, ids, output="log_probs"), expected[:, :, -1].log_softmax(-1))
    close(logit_lens(model, ids, output="logits", positions=2), expected[:, :, 2])
    close(logit_lens(model, ids, output="logits", positions=[-2, 0]), expected[:, :, [-2, 0]])
    for one, row in zip(logit_lens(model, ids, output="logits", positions="all"), expected, strict=True):
        close(one, row)


@pytest.mark.parametrize("model_type", SOME)
def test_padding_never_shows(model_type: str) -> None:
    model = wrapped(model_type)
    long, short = prompt_ids(1, 9)[0].tolist(), prompt_ids(1, 4, seed=1)[0].tolist()
    for positions in ("last", 1, [0, -2]):
        both = logit_lens(model, [long, short], positions=positions)
        for one, prompt in zip(both, (long, short), strict=True):
            close(one, logit_lens(model, prompt, positions=positions)[0])
    found = logit_lens(model, [long, short], positions="all")
    assert [one.shape[1] for one in found] == [9, 4]
    close(found[1], logit_lens(model, short, positions="all")[0])


@pytest.mark.parametrize("model_type", SOME)
def test_inverse_logits_are_the_head_of_the_negated_norm(model_type: str) -> None:
    """The norm whose output is negated is found by hand: the last one that runs before the logits."""
    hf, ids = shared(model_type), prompt_ids()
    norm = hf.get_submodule(PLACES[model_type][0].rpartition(".")[0])
    norm = next(m for name, m in norm.named_children() if name in ("ln_f", "norm", "final_layer_norm"))
    layers = layers_of(model_type)
    hidden = hooked(hf, lambda: hf(ids), {i: (layer, "output") for i, layer in enumerate(layers)})
    probs, inverse = logit_lens(wrapped(model_type), ids, return_inv_logits=True)
    close(probs, logit_lens(wrapped(model_type), ids))
    for i in range(len(layers)):
        handle = norm.register_forward_hook(lambda _, __, output: -output)
        logits = edited(lambda: hf(ids), layers[-1], "output", lambda _, i=i: hidden[i]).logits  # type: ignore[misc]
        handle.remove()
        close(inverse[:, i], logits[:, -1].softmax(-1))


def test_a_head_without_a_norm_has_no_inverse() -> None:
    model = StandardizedTransformer(zoo_shared("bert"))
    ids = zoo_ids(model.hf_model)
    assert logit_lens(model, ids).shape[1] == model.num_layers
    with pytest.raises(NotInThisModelError, match=r"ln_final: no norm reads"):
        logit_lens(model, ids, return_inv_logits=True)


def test_prompts_of_all_kinds_are_taken() -> None:
    text = "The capital of France is"
    expected = logit_lens(demo(), text)
    ids = demo().tokenizer(text)["input_ids"]
    for prompts in ([text], ids, [ids], torch.tensor(ids), Prompt(text, {}), [Prompt(text, {})]):
        assert torch.equal(logit_lens(demo(), prompts), expected)
    embeddings = demo().hf_model.get_input_embeddings()(torch.tensor([ids]))
    close(logit_lens(demo(), {"inputs_embeds": embeddings}), expected)


def test_what_cannot_be_given_is_said() -> None:
    with pytest.raises(InputError) as error:
        logit_lens(demo(), [[1, 2, 3], [1, 2]], positions=2)
    assert str(error.value) == ("positions: prompt 1 has 2 tokens, at 0 to 1 (or -2 to -1); there is no position 2.")
    unchecked = inspect.unwrap(logit_lens)  # the suite's type checks speak first
    with pytest.raises(InputError, match=r"output='prob': it is one of 'probs', 'logits', 'log_probs'\."):
        unchecked(demo(), [1, 2], output="prob")
    with pytest.raises(InputError, match=r"positions='first': it is \"last\", \"all\", or"):
        inspect.unwrap(positions_from_end)({"attention_mask": torch.ones(1, 2)}, "first")


@pytest.mark.parametrize("model_type", SOME)
def test_statistics_are_those_of_the_whole_lens(model_type: str) -> None:
    """In naive lines from all logits, in double precision."""
    hf, model = shared(model_type), wrapped(model_type)
    prompts = [prompt_ids(1, 9)[0].tolist(), prompt_ids(1, 5, seed=1)[0].tolist()]
    found = lens_statistics(model, prompts, targets=[5, 7], top_k=3, chunk_size=7)
    for i, (ids, target) in enumerate(zip(prompts, (5, 7), strict=True)):
        n = len(ids)
        logits = naive_logits(hf, layers_of(model_type), torch.tensor([ids]))[0].double()
        p = logits.softmax(-1)
        close(found.kl[i, :, -n:], (p[-1] * (p[-1] / p).log()).sum(-1).float())
        close(found.entropy[i, :, -n:], -(p * p.log()).sum(-1).float())
        close(found.target_probability[i, :, -n:], p[..., target].float())
        order = logits.argsort(-1, descending=True)
        assert torch.equal(found.target_rank[i, :, -n:], (order == target).int().argmax(-1))
        assert torch.equal(found.top_tokens[i, :, -n:], order[..., :3])
        close(found.top_probabilities[i, :, -n:], p.gather(-1, order[..., :3]).float())
    assert found.kl[1, :, :4].isnan().all()
    assert (found.target_rank[1, :, :4] == -1).all()
    assert (found.top_tokens[1, :, :4] == -1).all()
    assert found.target_tokens.tolist() == [[5] * 9, [-1] * 4 + [7] * 5]


def test_targets_of_statistics() -> None:
    model, text = demo(), "The capital of France is"
    ids = model.tokenizer(text)["input_ids"]
    own = lens_statistics(model, text)
    with torch.no_grad():
        predicted = model(text).logits[0].argmax(-1)
    assert torch.equal(own.target_tokens[0], predicted)
    assert (own.target_rank[0, -1] == 0).all()
    following = lens_statistics(model, text, next_tokens=True)
    assert following.target_tokens[0].tolist() == [*ids[1:], -1]
    assert following.target_rank[0, :, -1].tolist() == [-1] * model.num_layers
    assert following.target_probability[0, :, -1].isnan().all()
    paris = lens_statistics(model, [text, "Japan is in"], targets=[" Paris", " Asia"])
    assert [paris.texts[int(i)] for i in paris.target_tokens[:, -1]] == [" Paris", " Asia"]
    assert (paris.target_rank[:, -1, -1] == 0).all()
    assert (paris.kl[:, -1].nan_to_num() == 0).all()
    with pytest.raises(InputError, match=r"2 prompts and 1 target"):
        lens_statistics(model, ["a", "b"], targets=[1])
    with pytest.raises(InputError, match=r"not both"):
        lens_statistics(model, "a", targets=1, next_tokens=True)
    with pytest.raises(InputError, match=r"give texts or token ids, not inputs_embeds"):
        lens_statistics(model, {"inputs_embeds": torch.zeros(1, 2, model.hidden_size)})


class _Largest(TorchFunctionMode):
    """The largest tensor that any torch function gives."""

    size = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensor = result[0] if isinstance(result, tuple) and result else result
        if isinstance(tensor, Tensor):
            self.size = max(self.size, tensor.numel())
        return result


def test_statistics_never_hold_the_vocabulary_of_all_positions() -> None:
    model = demo()
    ids = torch.randint(5, model.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    handle = model.lm_head.module.register_forward_hook(lambda _, __, out: seen.append(out.numel()))
    try:
        with _Largest() as of_statistics:
            lens_statistics(model, ids, chunk_size=64)
        assert sum(seen) == model.num_layers * 100 * model.vocab_size
        assert max(seen) <= 64 * model.vocab_size
        assert of_statistics.size <= 64 * model.vocab_size
        with _Largest() as of_lens:
            logit_lens(model, ids, positions="all")
        assert of_lens.size == model.num_layers * 100 * model.vocab_size  # the measure sees it
    finally:
        handle.remove()


def test_the_lens_shows_the_answer_form_and_is_drawn() -> None:
    found = lens_statistics(demo(), ["The capital of France is", "Italy is in"], targets=[" Paris", " Europe"])
    assert (found.target_probability[:, 0, -1] < 0.5).all()
    assert (found.target_probability[:, -1, -1] > 0.9).all()
    assert (found.kl[:, 0, -1] > found.kl[:, -2, -1]).all()
    figure = found.plot()
    assert figure.data[0].z.shape == (demo().num_layers, 5)
    assert figure.layout.title.text == "Lens statistics, probability: 'The capital of France is'"
    assert found.plot("target_rank", prompt=1).data[0].z.tolist() == found.target_rank[1, :, -3:].tolist()


@pytest.mark.parametrize("positions", ["last", "all", [0, -2]])
def test_prompts_keep_their_order_whatever_runs_together(positions: Any) -> None:
    model = wrapped("llama")
    prompts = [prompt_ids(1, n, seed=i)[0].tolist() for i, n in enumerate((4, 9, 3, 6, 9))]
    alone = [logit_lens(model, prompt, positions=positions, return_inv_logits=True) for prompt in prompts]
    for size in (1, 2, 5):
        found = logit_lens(model, prompts, positions=positions, return_inv_logits=True, batch_size=size)
        for i, pair in enumerate(alone):
            for one, expected in zip(found, pair, strict=True):
                close(one[i], expected[0])


def test_short_prompts_are_not_run_at_the_length_of_long_ones() -> None:
    model, shapes = wrapped("llama"), []
    prompts = [prompt_ids(1, n, seed=n)[0].tolist() for n in (4, 9, 3, 8)]
    handle = model.hf_model.model.embed_tokens.register_forward_hook(
        lambda _, args, __: shapes.append(tuple(args[0].shape))
    )
    logit_lens(model, prompts, batch_size=2)
    handle.remove()
    assert shapes == [(2, 9), (2, 4)]


def test_a_plot_of_nothing_is_said() -> None:
    found = lens_statistics(StandardizedTransformer("demo:gpt2"), "Japan is in")
    with pytest.raises(InputError, match=r"value='rank': it is one of 'probability', 'kl'"):
        found.plot("rank")
    with pytest.raises(InputError, match=r"prompt=1: there are 1, from 0 on"):
        found.plot(prompt=1)


def test_of_an_encoder_decoder_positions_are_the_decoders() -> None:
    hf = encoder_decoders.build("T5ForConditionalGeneration")
    model, inputs = StandardizedTransformer(hf), encoder_decoders.inputs_of(hf)
    inputs["attention_mask"] = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    with torch.no_grad():
        expected = hf(**inputs).logits
    last, every = (logit_lens(model, inputs, output="logits", positions=where) for where in ("last", "all"))
    assert torch.allclose(last[:, -1], expected[:, -1], atol=1e-4)
    for mine, logits in zip(every, expected, strict=True):
        assert torch.allclose(mine[-1], logits, atol=1e-4)


def test_the_inverse_of_an_edited_view_has_the_edit_once() -> None:
    model = demo()
    vector = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    edited_view = model.edit(lambda: model.steer(-1, vector, token_positions=3))
    with torch.no_grad(), edited_view.trace("The capital of France is"):
        hidden = edited_view.layers_output[-1][:, -1]
    with torch.no_grad(), hooked_norm(model.ln_final.module):
        expected = model.project_on_vocab(hidden)
    _, inverse = logit_lens(edited_view, "The capital of France is", return_inv_logits=True, output="logits")
    assert torch.allclose(inverse[:, -1], expected, atol=1e-4)


@contextlib.contextmanager
def hooked_norm(norm: torch.nn.Module) -> Iterator[None]:
    handle = norm.register_forward_hook(lambda _, __, output: -output)
    try:
        yield
    finally:
        handle.remove()
