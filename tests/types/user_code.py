"""What a user writes: type checkers know what each of it is. (It is checked by `test_types.py`, and not run.)"""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor
from torch.nn import Linear

from nnatomy import StandardizedTransformer, Traceable
from nnatomy.methods import (
    SteeringVector,
    activation_patching,
    direct_logit_attribution,
    head_ablation,
    logit_difference,
)
from nnatomy.methods.activation_patching import Patching
from nnatomy.plans import Plan
from nnatomy.standardized import ActivationCache, LayerAccessor
from nnatomy.tracing import Trace as Tracer


class Mine(StandardizedTransformer):
    """A class of the user's own."""


def users() -> None:
    model = StandardizedTransformer("demo:gpt2")
    vector = torch.ones(model.hidden_size)

    with model.trace("The capital of France is") as tracer:
        assert_type(tracer, Tracer)
        assert_type(model.layers_output, LayerAccessor)
        assert_type(model.layers_output[3], Tensor)
        assert_type(model.layers_output[-1], Tensor)
        assert_type(model.layers_output[:2], list[Tensor])
        assert_type(model.encoder_layers_output[0], Tensor)
        for hidden in model.mlps_output:
            assert_type(hidden, Tensor)
        model.mlps_output[5] = 0 * model.mlps_output[5]
        model.layers_output[:] = [vector] * model.num_layers
        assert_type(model.token_embeddings, Tensor)
        assert_type(model.logits, Tensor)
        assert_type(model.next_token_probs, Tensor)
        assert_type(model.input_ids, Tensor)
        assert_type(model.input_size, torch.Size)
        assert_type(model.project_on_vocab(vector), Tensor)
        assert_type(model.get_topk_closest_tokens(vector), dict[str, float] | list[dict[str, float]])
        assert_type(model.read("layers_output", "attention_probabilities"), ActivationCache)
        model.skip_layer(1)
        model.skip_layers(1, 2, skip_with=vector)
        model.steer([2, 3], vector, factor=4.0, token_positions=-1)
        resid = model.layers_output[3]
    assert_type(resid, Tensor)  # also for a checker that asks whether a block may have been left halfway

    with model.trace() as tracer:
        with tracer.invoke("Japan is in"):
            inner = model.logits
    assert_type(inner, Tensor)

    with model.generate("The capital of France is", max_new_tokens=3) as tracer:
        assert_type(tracer, Tracer)
        for step in tracer.iter[:]:
            assert_type(step, int)
        for step in tracer.all():
            assert_type(step, int)

    assert_type(model.generate_text("Japan is in", max_new_tokens=3), str)
    assert_type(model.generate_text(["Japan is in", "Peru is in"], max_new_tokens=3), list[str])
    assert_type(model.generate_text("Japan is in", num_return_sequences=2, do_sample=True), str | list[str])
    assert_type(model.to_tokens("Japan is in"), Tensor)
    assert_type(model.to_str_tokens("Japan is in"), list[str])
    assert_type(model.to_string(5), str)
    assert_type(model.to_string([5, 6]), str)
    model.test_prompt("The capital of France is", " Paris")

    logits, cache = model.run_with_cache("Japan is in", ["layers_output"], layers=[1, 2], positions=-1, device="cpu")
    assert_type(cache, ActivationCache)
    assert_type(cache.layers_output[5], Tensor)
    assert_type(cache["layers_output", 5], Tensor)
    assert_type(cache["layers_output"][1:], list[Tensor])
    assert_type(cache.stack("layers_output"), Tensor)

    assert_type(model.W_Q[3], Tensor)
    assert_type(model.W_Q[:2], list[Tensor])
    assert_type(model.W_E, Tensor)
    assert_type(model.composition_scores(0, 1, by="K"), Tensor)
    assert_type(model.kv_head(1), int)

    with model.edit() as edited:
        model.steer(2, vector)
    assert_type(edited, StandardizedTransformer)
    assert_type(model.edit(lambda: model.steer(2, vector)), StandardizedTransformer)
    assert_type(model.edit(lambda: model.steer(2, vector)).without_edits(), StandardizedTransformer)
    assert_type(model.attach("layers_output[2]", Linear(96, 96), how="add"), StandardizedTransformer)
    assert_type(model.refresh(), StandardizedTransformer)
    assert_type(Mine("demo:gpt2").edit(lambda: None), Mine)
    with Mine("demo:gpt2").edit() as mine:
        pass
    assert_type(mine, Mine)
    with model.session() as session:
        assert_type(session, StandardizedTransformer)

    with model.record("Japan is in") as plan:
        model.skip_layer(1)
    assert_type(plan, Plan)
    assert_type(model.record(lambda: model.skip_layer(1)), Plan)
    assert_type(model.record(edited), Plan)

    assert_type(model.num_layers, int)
    assert_type(len(model.mlps[:2]), int)
    assert_type(model.layers[3].mlp.path, str)
    assert_type(model.transformer.h.path, str)

    found = activation_patching(
        model,
        clean="The capital of France is",
        corrupted="The capital of Japan is",
        metric=logit_difference(" Paris", " Tokyo", model),
        point="heads_output",
        heads="each",
        mode="noising",
    )
    assert_type(found, Patching)
    assert_type(found.normalized, Tensor)
    head_ablation(model, "Japan is in", metric=logit_difference(" Paris", " Tokyo", model), how="mean")
    direct_logit_attribution(model, "Japan is in", answer=" Asia", by="head")
    steering = SteeringVector.from_prompts(model, ["good"], ["bad"], method="mean_difference", point="layers_output")
    assert_type(steering, SteeringVector)

    net = Traceable(Linear(4, 2))
    with net.trace(torch.ones(1, 4)) as on_any_module:
        assert_type(on_any_module.stop(), None)
