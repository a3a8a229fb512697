"""nnterp's calls on models of this library, against plain hooks, the models' own modules, and the main library's refusals."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from reference import hooked
from torch import Tensor, nn

from nnatomy.compat.nnterp import ModuleAccessor, StandardizedTransformer, get_rename_dict
from nnatomy.compat.nnterp.interventions import (
    TargetPrompt,
    logit_lens,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    repeat_prompt,
)
from nnatomy.compat.nnterp.nnsight_utils import (
    collect_last_token_activations_session,
    compute_next_token_probs,
    get_attention_output,
    get_layer_input,
    get_layer_output,
    get_mlp_output,
    get_next_token_probs,
    get_num_layers,
    get_token_activations,
    project_on_vocab,
    set_layer_output,
)
from nnatomy.compat.nnterp.prompt_utils import Prompt, run_prompts
from nnatomy.compat.nnterp.rename_utils import RenameConfig, get_hidden_size, get_ignores, get_vocab_size
from nnatomy.errors import InputError

PROMPT = "The capital of Peru is"
#: By type, where its layers are, and the names in one of attention and MLP.
PLACES = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", None),
    "mixtral": ("model.layers", "self_attn", "mlp"),
}


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer("demo:gpt2", enable_attention_probs=True, device_map="auto")


def ids(model: StandardizedTransformer, *prompts: str) -> Tensor:
    return model.tokenizer(list(prompts), return_tensors="pt")["input_ids"]


def logits_with(model: StandardizedTransformer, module: nn.Module, edit: Any) -> Tensor:
    handle = module.register_forward_hook(lambda _, __, output: edit(output))
    try:
        with torch.no_grad():
            return model._model(ids(model, PROMPT)).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("model_type", PLACES)
def test_names_on_what_holds_the_layers(model_type: str) -> None:
    hf = build(model_type)
    model = StandardizedTransformer(hf)
    path, attention, mlp = PLACES[model_type]
    layers = hf.get_submodule(path)
    assert [view.module for view in model.model.layers] == [*layers]
    assert model.layers[1].module is model.model.layers[1].module is layers[1]
    assert model.layers[1].self_attn.module is model.attentions[1].module is layers[1].get_submodule(attention)
    if mlp is not None:
        assert model.model.layers[1].mlp.module is model.mlps(1).module is layers[1].get_submodule(mlp)
    assert model.model.ln_final.module is model.ln_final.module
    assert model.model.embed_tokens.module is hf.get_input_embeddings()
    assert get_ignores(hf) == (["mlp"] if mlp is None else [])
    assert get_vocab_size(hf) == model.vocab_size == hf.config.vocab_size
    assert get_hidden_size(hf) == model.hidden_size
    accessor = ModuleAccessor(hf)
    assert accessor.get_layers() is accessor.layers is layers
    assert accessor.get_attention(1) is layers[1].get_submodule(attention)
    assert accessor.get_unembed() is accessor.lm_head is hf.get_output_embeddings()
    with pytest.raises(AttributeError, match=r"^Attribute tokenizer is not a module$"):
        accessor.tokenizer
    x = torch.arange(2, 7)[None]
    seen = hooked(
        hf, lambda: hf(x), {"layer": (layers[1], "output"), "attention": (layers[1].get_submodule(attention), "output")}
    )
    with torch.no_grad(), model.trace(x):
        attention_output = model.attentions_output[1].save()
        layer = model.layers_output[1].save()
    assert torch.equal(layer, seen["layer"])
    assert torch.equal(attention_output, seen["attention"])


def test_functions_of_layers(model: StandardizedTransformer) -> None:
    h = model._model.transformer.h
    points = {
        "in": (h[0], "input"),
        "attention": (h[0].attn, "output"),
        "mlp": (h[0].mlp, "output"),
        "out": (h[0], "output"),
    }
    seen = hooked(model._model, lambda: model._model(ids(model, PROMPT)), points)
    with torch.no_grad(), model.trace(PROMPT):
        assert torch.equal(get_layer_input(model, 0).save(), seen["in"])
        assert torch.equal(get_attention_output(model, 0), seen["attention"])
        assert torch.equal(get_mlp_output(model, 0), seen["mlp"])
        out = get_layer_output(model, 0).save()
        assert torch.equal(out, seen["out"])
        set_layer_output(model, 1, out)
        probs = get_next_token_probs(model).save()
        projected = project_on_vocab(model, out)
    expected = logits_with(model, h[1], lambda _: out)
    assert torch.allclose(probs, expected[:, -1].softmax(-1), atol=1e-5)
    lens = model._model.lm_head(model._model.transformer.ln_f(out))
    assert torch.allclose(projected, lens, atol=1e-4)
    top = model.get_topk_closest_tokens(out[0, -1], k=2)
    best = lens[0, -1].softmax(-1).topk(2)
    assert [*top] == model.tokenizer.convert_ids_to_tokens(best.indices)
    assert torch.allclose(torch.tensor([*top.values()]), best.values, atol=1e-5)
    both = model.get_topk_closest_tokens(out[0, -2:], k=2)
    assert both[1] == pytest.approx(top, abs=1e-6)
    with pytest.raises(ValueError, match=r"^A hidden state is of \(96\) or \(row, 96\); got \(1, 5, 96\)\.$"):
        model.get_topk_closest_tokens(out)


def test_steering_and_skipping(model: StandardizedTransformer) -> None:
    h, vector = model._model.transformer.h, torch.linspace(-1, 1, 96)
    with torch.no_grad(), model.trace(PROMPT):
        model.steer(layers=2, steering_vector=vector, factor=3, token_positions=[1, -1])
        steered = model.logits.save()
    where = torch.tensor([0.0, 1, 0, 0, 1])[None, :, None]
    assert torch.allclose(steered, logits_with(model, h[2], lambda out: out + 3 * where * vector), atol=1e-4)
    with torch.no_grad(), model.trace(PROMPT):
        with pytest.warns(DeprecationWarning, match=r"^`positions` is deprecated"):
            model.steer(2, vector, 3.0, positions=[1, -1])
        again = model.logits.save()
    assert torch.equal(again, steered)
    with model.trace(PROMPT), pytest.raises(ValueError, match=r"^Cannot specify both"):
        model.steer(2, vector, positions=0, token_positions=0)
    with torch.no_grad(), model.trace(PROMPT):
        given = model.layers_input[1]
        model.detect_layer_output_type()
        model.skip_layers(2, 3, skip_with=(given, None), layer_returns_tuple=True)
        skipped = model.logits.save()
    assert torch.allclose(skipped, logits_with(model, h[3], lambda _: given), atol=1e-4)


def test_attention_probabilities(model: StandardizedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.attn_probs_available
    assert model.attention_probabilities.enabled
    model.attention_probabilities.check_source()
    model.attention_probabilities.print_source(layer=1)
    assert (
        capsys.readouterr().out == "Attention probabilities of layer 1: what multiplies the values in GPT2Attention.\n"
    )
    with torch.no_grad(), model.trace(PROMPT):
        pattern = model.attention_probabilities[1].save()
    expected = model._model(ids(model, PROMPT), output_attentions=True).attentions[1]
    assert torch.allclose(pattern, expected, atol=1e-6)


def test_interventions(model: StandardizedTransformer) -> None:
    h, prompts = model._model.transformer.h, [PROMPT, "The capital of Cuba is"]
    seen = hooked(
        model._model, lambda: model._model(ids(model, *prompts)), {i: (layer, "output") for i, layer in enumerate(h)}
    )
    norm, head = model._model.transformer.ln_f, model._model.lm_head
    # The last layer's output is behind no norm, as that of the others is.
    expected = torch.stack([head(norm(seen[i][:, -1])).softmax(-1) for i in range(len(h))], 1)
    probs, inverse = logit_lens(model, prompts, return_inv_logits=True)
    assert torch.allclose(probs, expected, atol=1e-5)
    negated = torch.stack([head(-norm(seen[i][:, -1])).softmax(-1) for i in range(len(h))], 1)
    assert torch.allclose(inverse, negated, atol=1e-5)
    latents = get_token_activations(model, prompts)
    assert torch.allclose(latents, torch.stack([seen[i][:, -1] for i in range(len(h))]), atol=1e-5)
    assert torch.allclose(collect_last_token_activations_session(model, prompts, batch_size=1), latents, atol=1e-5)
    assert torch.allclose(compute_next_token_probs(model, prompts), expected[:, -1], atol=1e-5)
    target = TargetPrompt(PROMPT, 2)

    def patched(layer: int, state: Tensor) -> Tensor:
        def put(out: Tensor) -> Tensor:
            out = out.clone()
            out[:, 2] = state
            return out

        return logits_with(model, h[layer], put)[0, -1].softmax(-1)

    found = patchscope_lens(model, prompts, target, layers=[1, 3])
    for row, source in enumerate(range(2)):
        for column, layer in enumerate((1, 3)):
            assert torch.allclose(found[row, column], patched(layer, latents[layer, source]), atol=1e-4)
    of_latents = patchscope_lens(model, target_patch_prompts=target, layers=[0, 1], latents=latents[2:4])
    assert torch.allclose(of_latents[1, 1], patched(1, latents[3, 1]), atol=1e-4)
    generated = patchscope_generate(model, [PROMPT], target, max_length=2, layers=[1])
    assert torch.equal(generated[1][0, 5], patched(1, latents[1, 0]).argmax())
    assert patch_object_attn_lens(model, [PROMPT], [PROMPT], attn_idx_patch=1).shape == (1, len(h), model.vocab_size)
    assert repeat_prompt(["cat"]).prompt == "cat cat\n?"


def test_prompts(model: StandardizedTransformer) -> None:
    prompts = [Prompt.from_strings(PROMPT, {"right": "Lima"}, model)]
    found = run_prompts(model, prompts, get_probs_func=logit_lens, tqdm=None)
    lens = logit_lens(model, PROMPT)
    assert torch.allclose(found["right"], lens[:, :, prompts[0].target_tokens["right"]].sum(-1))
    assert get_num_layers(model) == found["right"].shape[1]


def test_names_of_ones_own(model: StandardizedTransformer) -> None:
    config = RenameConfig(layers_name="transformer.h", mlp_name=["mlp"], attn_name="attn")
    assert get_rename_dict(config) == {"transformer.h": "layers", "attn": "self_attn"}
    assert get_rename_dict() == {}
    other = StandardizedTransformer(
        model._model, tokenizer=model.tokenizer, rename_config=config, rename={"ln_1": "before"}, check_renaming=False
    )
    assert other.layers[0].before.module is model._model.transformer.h[0].ln_1
    assert other.num_layers == 6


def test_refusals(model: StandardizedTransformer) -> None:
    with pytest.raises(InputError, match=r"^StandardizedTransformer\(\.\.\., remote=True\): there is no NDIF here"):
        StandardizedTransformer("demo:gpt2", remote=True)
    with pytest.raises(InputError, match=r"^logit_lens\(\.\.\., remote=True\): there is no NDIF here"):
        logit_lens(model, PROMPT, remote=True)
    with pytest.raises(
        InputError, match=r"^RenameConfig\(attn_prob_source=\.\.\.\): attention probabilities are found"
    ):
        get_rename_dict(RenameConfig(attn_prob_source=print))
    with pytest.raises(ValueError, match=r"^enable_attention_probs=True: leave attn_implementation out"):
        StandardizedTransformer("demo:gpt2", enable_attention_probs=True, attn_implementation="sdpa")
    with pytest.warns(UserWarning, match=r"^attn_rename='attn': nnterp has no such argument any more"):
        StandardizedTransformer(model._model, attn_rename="attn", check_renaming=False)


def test_the_page(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "from_nnterp.md").read_text()
    script = tmp_path / "script.py"
    script.write_text("\n".join(re.findall(r"(?s)```python\n(.*?)```", page)))
    names = runpy.run_path(str(script))
    assert names["probs"].shape[:2] == (1, 6)
    assert names["hidden"].shape == (1, 5, 96)
    assert not torch.equal(names["logits"], names["model"]("The capital of France is").logits)
