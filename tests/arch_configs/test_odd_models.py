"""Models with code of their own, each odd in a way: loaded with names that mean what they should, or refused with the true reason."""

from __future__ import annotations

from typing import Any

import odd_models as odd
import pytest
import torch
from odd_models import HEADS, VOCAB, WIDTH, make
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs import logits_of
from nnatomy.errors import InputError, NotInThisModelError, RowsError, UnknownArchitectureError
from nnatomy.methods import logit_lens
from nnatomy.names import TABLE

IDS = torch.tensor([[3, 17, 40, 8, 22, 5, 19], [11, 2, 60, 7, 33, 41, 9]])
NO_MASK = "its forward has no argument attention_mask, by which it would know padding"
NO_HEAD = "no module is: the model computes its logits by functions"
NORMED = "the stream is normalised on its way through the layer, so that input and contributions are not the output"
SUMS = ("layers_mid", "attentions_contribution", "mixers_contribution", "mlps_contribution")
INSIDE = (
    *("queries", "keys", "values", "attention_scores", "attention_probabilities"),
    *("values_weighted", "heads_output"),
)
ROUTERS = ("routers_logits", "routers_experts", "routers_weights")
OF_MIXERS = {row.name for row in TABLE if row.place == "mixer"}
#: Why a mixer that is no attention and keeps no state has none of a recurrent one's values.
MIXED_BY_HAND = dict.fromkeys(OF_MIXERS, "its call keeps nothing for the next one") | {
    "time_steps": "no softplus gives any that torch sees (a fused kernel shows none)",
    "mixer_gates": "nothing multiplies what its output projection reads",
}
#: What each refuses beside routers, and why, by the beginning of the text; all else is verified.
REFUSED: dict[type[Any], dict[tuple[str, ...], str]] = {
    odd.Odd: {},
    odd.OneTuples: {},
    odd.InADict: {("padding",): "it shows in layers_output[-1]"},
    odd.ByName: {},
    odd.Headless: {("lm_head",): NO_HEAD},
    odd.ByHand: {
        (
            *INSIDE,
            "attentions_input",
            "attentions_output",
            "attentions_contribution",
        ): "its token mixer is look (HandMade)"
    },
    odd.PostNorm: {SUMS: NORMED},
    odd.Dataclasses: {},
    odd.ModelOutputs: {},
    odd.Dicts: {},
    odd.NamedTuples: {},
    odd.TwoStacks: {("padding",): "it shows in layers_output[-1]"},
    odd.Siblings: {
        ("ln_final",): "none reads what the last layer gives",
        ("project_on_vocab",): "none that passes validation: of layers_output[-1] is not the logits",
    },
    odd.Backwards: {},
    odd.OneState: {},
    odd.FewerOut: {},
    odd.Lengths: {("padding",): "it shows in layers_output[-1]"},
    odd.NoMask: {("padding",): NO_MASK},
    odd.LogitsAndLossByIds: {("padding",): "it shows in layers_output[-1]"},
    odd.LogitsInADict: {("padding",): "it shows in layers_output[-1]"},
    odd.Nested: {},
    odd.Lying: {},
    odd.Plain: {("padding",): NO_MASK},
}
every = pytest.mark.parametrize("kind", list(REFUSED), ids=lambda kind: kind.__name__)


@every
def test_what_is_verified_and_what_is_refused(kind: type[Any]) -> None:
    model = StandardizedTransformer(make(kind))
    expected = {name: why for names, why in REFUSED[kind].items() for name in names}
    for row in model.validation:
        if row.name in ROUTERS:
            assert row.detail.endswith("no experts to choose from"), row
        elif row.name in OF_MIXERS:
            assert row.status == "refused", row
            assert row.detail == (
                MIXED_BY_HAND[row.name] if kind is odd.ByHand else "no token mixer of it is recurrent"
            ), row
        elif row.name in expected:
            assert row.status == "refused", row
            assert row.detail.startswith(expected[row.name]), row
        else:
            assert row.status == "verified", row


@every
def test_the_numbers_are_those_of_the_modules(kind: type[Any]) -> None:
    hf = make(kind)
    model = StandardizedTransformer(hf)
    given = logits_in(hf(IDS)).shape[-1]
    assert given == (VOCAB - 9 if kind is odd.FewerOut else VOCAB)
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (len(hf.layers()), WIDTH, given)
    assert [view.module for view in model.layers] == hf.layers()
    if kind is odd.ByHand:
        with pytest.raises(
            NotInThisModelError, match="num_heads: ByHand has no one number for it: there are no attention h"
        ):
            model.num_heads
    else:
        assert (model.num_heads, model.num_kv_heads, model.head_dim) == (HEADS, 1, WIDTH // HEADS)
    assert model.prepare([VOCAB - 1])["input_ids"].item() == VOCAB - 1
    with pytest.raises(InputError, match=f"Token id {VOCAB} is outside of the model's vocabulary of {VOCAB}"):
        model.prepare([VOCAB])


@every
def test_values_are_what_hooks_see_and_edits_what_hooks_do(kind: type[Any]) -> None:
    hf = make(kind)
    model, layers = StandardizedTransformer(hf), hf.layers()
    seen: dict[Any, Tensor] = {}
    handles = []
    for i, layer in enumerate(layers):

        def before(_: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
            seen["layers_input", i] = stream_in((args, kwargs))

        def after(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
            seen["layers_output", i] = odd.tensor_in(output)

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
        handles.append(
            layer.think.register_forward_hook(lambda *call, i=i: seen.update({("mlps_output", i): call[-1]}))
        )
    with torch.no_grad():
        plain = logits_in(hf(IDS))
    for handle in handles:
        handle.remove()

    def double(_: nn.Module, __: Any, output: Any) -> Any:
        """In place, so that the form does not matter."""
        odd.tensor_in(output).mul_(2)

    handle = layers[1].register_forward_hook(double)
    with torch.no_grad():
        doubled = logits_in(hf(IDS))
    handle.remove()
    assert not torch.allclose(plain, doubled, atol=0.1)
    with torch.no_grad():
        with model.trace(IDS):
            values = {
                (name, i): getattr(model, name)[i]
                for i in range(len(layers))
                for name in ("layers_input", "mlps_output", "layers_output")
            }
            logits = model.logits
        assert all(torch.equal(values[point], value) for point, value in seen.items())
        assert torch.equal(logits, plain)
        with model.trace(IDS):
            model.layers_output[1] = 2 * model.layers_output[1]
            assert torch.equal(model.logits, doubled)
        with model.trace(IDS) as tracer:
            model.logits = 2 * model.logits
            assert torch.equal(logits_in(tracer.result), 2 * plain)
        if model.validation["project_on_vocab", None].status == "verified":
            last = values["layers_output", len(layers) - 1]
            torch.testing.assert_close(model.project_on_vocab(last), plain, rtol=1e-4, atol=1e-4)
            lens = logit_lens(model, IDS)
            torch.testing.assert_close(lens[:, -1], plain[:, -1].softmax(-1), rtol=1e-4, atol=1e-4)


def stream_in(given: Any) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    (stream,) = leaves
    return stream


def logits_in(result: Any) -> Tensor:
    if isinstance(result, dict):
        return result["logits"]
    return result[0] if isinstance(result, tuple) else result


@every
def test_blocks_of_their_own_prompts(kind: type[Any]) -> None:
    """Each sees its rows, in whatever form modules give them."""
    model = StandardizedTransformer(make(kind))
    if kind in (odd.Dataclasses, odd.ModelOutputs):
        with pytest.raises(
            RowsError, match="nobody can tell which of its rows|nobody can tell which rows are this block's"
        ):
            with torch.no_grad(), model.trace() as tracer:
                for row in IDS.tolist():
                    tracer.invoke([row], lambda: model.layers_output[1])
        return
    with torch.no_grad():
        with model.trace() as tracer:
            blocks = [tracer.invoke([row], lambda: (model.layers_output[1], model.logits)) for row in IDS.tolist()]
        for block, row in zip(blocks, IDS.tolist(), strict=True):
            with model.trace([row]):
                alone = model.layers_output[1], model.logits
            for mine, other in zip(block.value, alone, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_the_stream_has_another_order() -> None:
    model = StandardizedTransformer(make(odd.SeqFirst))
    assert [view.module for view in model.layers] == model.hf_model.layers()
    assert model.layer_kinds == ("unknown",) * 3
    assert model.validation["layers_output", 1].detail == ("none that passes validation: is (6, 2, 24), not (2, 6, 24)")
    odd_states = "what it consists of does not show, as its hidden states are not of (batch, seq, hidden)"
    for name in ("attentions_output", "mlps_output", "mixers_output", "attention_probabilities"):
        assert model.validation[name, 1].detail == odd_states
    assert model.validation["project_on_vocab", None].status == "refused"
    with torch.no_grad(), model.trace(IDS):
        assert torch.equal(model.logits, model.hf_model(IDS).logits)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (odd.NeedsLengths, r"missing 1 required positional argument: 'lengths'"),
        (odd.LogitsAndLoss, r"got an unexpected keyword argument 'input_ids'"),
    ],
)
def test_what_cannot_be_run_on_tokens_says_why(kind: type[Any], why: str) -> None:
    refused(
        kind,
        rf"modules of {kind.__name__} are does not show: it cannot be run on token ids alone \(.*{why}\)",
    )


def refused(kind: type[Any], why: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=why):
        StandardizedTransformer(make(kind))


SKIPPED = r"\(something is added, scaled or skipped between them, or the stream is not the first tensor of several that they take\)"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (odd.Skips, rf"what tower\.1 gives is not what tower\.2 is given {SKIPPED}"),
        (odd.AddedOutside, rf"what tower\.0 gives is not what tower\.1 is given {SKIPPED}"),
        (odd.OneForAll, r"tower\.0 is called 3 times in a forward pass"),
    ],
)
def test_layers_that_do_not_hand_on_are_none(kind: type[Any], why: str) -> None:
    """And not the parts of a layer's MLP, which do."""
    refused(kind, rf"no list of modules hands hidden states from one to the next: {why}\. Say so")


def test_logits_of_something_else() -> None:
    with pytest.raises(
        InputError,
        match=r"LastAlone gives logits of \(2, 61\), and not of \(batch, seq, vocab\) for a batch of 2",
    ):
        StandardizedTransformer(make(odd.LastAlone))
    with pytest.raises(
        UnknownArchitectureError, match=r"its logits are \(2, 5, 5\), no \(batch, seq, vocab\) of 61 tokens"
    ):
        StandardizedTransformer(make(odd.Classes))


def test_without_a_mask_prompts_are_of_one_length() -> None:
    model = StandardizedTransformer(make(odd.NoMask))
    assert not model.takes_padding
    with pytest.raises(InputError, match=rf"of 3, 2 tokens.*: {NO_MASK}\. Give prompts of one length"):
        model.trace([[3, 4, 5], [6, 7]])
    padded = {"input_ids": IDS, "attention_mask": torch.tensor([[0] + [1] * 6, [1] * 7])}
    with pytest.raises(InputError, match=f"attention_mask leaves tokens out, and {NO_MASK}"):
        model.trace(padded)
    with torch.no_grad(), model.trace(IDS):
        assert torch.equal(model.attention_mask, torch.ones_like(IDS))
        assert torch.equal(model.logits, model.hf_model(IDS))


def test_unvalidated_the_modules_still_say_what_they_are() -> None:
    model = StandardizedTransformer(make(odd.Lying), validate=False)
    assert (model.num_layers, model.hidden_size, model.vocab_size, model.num_heads) == (
        3,
        WIDTH,
        VOCAB,
        HEADS,
    )


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (torch.ones(2, 3, 5), True),
        ((torch.ones(2, 3, 5), None), True),
        ({"logits": torch.ones(2, 3, 5)}, True),
        ((torch.ones(()), torch.ones(2, 3, 5)), False),
        ({"loss": torch.ones(())}, False),
        (torch.ones(2, 3, 5).long(), False),
    ],
)
def test_logits_in_what_a_model_returns(result: Any, found: bool) -> None:
    assert (logits_of(result) is not None) == found
