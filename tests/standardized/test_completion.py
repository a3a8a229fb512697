"""What completion and `help` know of a model: its own children, the names that it has, and what each of these is."""

from __future__ import annotations

import io
import pydoc
from contextlib import redirect_stdout

import pytest
import zoo
from torch.nn import Identity

from nnatomy import StandardizedTransformer
from nnatomy.errors import UsageError
from nnatomy.names import OF_LAYERS, ROWS
from nnatomy.standardized import LayerAccessor


def loaded(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(zoo.shared(model_type))


def test_completion_has_the_models_own_children_and_its_names() -> None:
    shown = dir(loaded("gpt2"))
    assert {"transformer", "layers_output", "attention_probabilities", "neurons", "logits", "trace", "W_Q"} <= {*shown}
    assert len({*shown}) == len(shown)


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "mixtral", "opt"])
def test_completion_has_no_name_that_the_model_refuses_on_every_layer(model_type: str) -> None:
    model = loaded(model_type)
    shown = {*dir(model)}
    for name in OF_LAYERS:
        assert (name in shown) == any(one is not None for one in getattr(model, name).modules), name
    assert not any(name.startswith(("encoder_", "cross_")) for name in shown)


def test_what_is_left_out_is_refused_with_its_reason() -> None:
    model = loaded("mamba")
    assert not {"attention_probabilities", "num_heads"} & {*dir(model)}
    with pytest.raises(UsageError, match="'queries'.* a standard name, which this model refuses: give another"):
        model.attach("layers_output[0]", Identity(), name="queries")


def test_help_says_what_a_name_is_and_its_shape() -> None:
    model = loaded("gpt2")
    with redirect_stdout(said := io.StringIO()):
        pydoc.doc(model.layers_output, output=said)
    assert "`layers_output[layer]`: the residual stream after the layer." in said.getvalue()
    assert "A tensor of (batch, seq, hidden)" in said.getvalue()
    assert f"The layers are 0 to {model.num_layers - 1}." in said.getvalue()
    assert "This model has none: no layer attends to an encoder." in (model.cross_attentions_output.__doc__ or "")
    assert repr(model.queries) == f"<queries[layer]: (batch, head, query, head_dim). {ROWS['queries'].doc}>"


def test_help_says_which_layers_have_it() -> None:
    model = loaded("jamba")
    there = model.attention_layers
    assert 0 < len(there) < model.num_layers
    assert f"; of these {', '.join(map(str, there))} have it." in (model.queries.__doc__ or "")


def test_help_says_why_there_is_none() -> None:
    assert "This model has none: its token mixer is mixer (mamba)" in (loaded("mamba").queries.__doc__ or "")


def test_the_class_is_described_as_a_class() -> None:
    assert (LayerAccessor.__doc__ or "").startswith("A standard name: `accessor[i]` reads it on layer `i`")
