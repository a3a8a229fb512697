"""TransformerLens's names against the models' own modules and plain hooks on them."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from architectures import build, prompt_ids
from reference import edited, hooked
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.compat.transformer_lens import HOOKS, ActivationCache, HookedTransformer, HookPoint, get_act_name
from nnatomy.errors import InputError, NoSuchModuleError, NotInThisModelError
from nnatomy.standardized.elsewhere import ROOMS

IDS = prompt_ids(seed=1)


def of(model_type: str) -> tuple[Any, HookedTransformer]:
    hf = build(model_type)
    return hf, HookedTransformer(StandardizedTransformer(hf))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox"])
def test_values_of_hook_names(model_type: str) -> None:
    hf, model = of(model_type)
    layers = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}[model_type]
    blocks = list(hf.get_submodule(layers))
    mlp = "mlp"
    places = {f"blocks.{i}.hook_resid_post": (block, "output") for i, block in enumerate(blocks)}
    places |= {f"blocks.{i}.hook_mlp_out": (block.get_submodule(mlp), "output") for i, block in enumerate(blocks)}
    expected = hooked(hf, lambda: hf(IDS), places)
    with torch.no_grad():
        plain = hf(IDS).logits
        logits, cache = model.run_with_cache(IDS)
    assert torch.equal(logits, plain)
    computed = {f"blocks.{i}.mlp.hook_pre" for i in range(len(blocks))}
    assert {*cache} == {*model.hook_dict, *computed}
    for name, value in expected.items():
        assert torch.allclose(cache[name], value, atol=1e-5)
    for i in range(1, len(blocks)):
        assert torch.equal(cache["resid_pre", i], cache["resid_post", i - 1])
    assert torch.equal(cache["resid_post", -1], cache[f"blocks.{len(blocks) - 1}.hook_resid_post"])
    assert cache["hook_embed"].shape == (*IDS.shape, model.cfg.d_model)
    assert cache.stack_activation("resid_post").shape == (len(blocks), *IDS.shape, model.cfg.d_model)
    pattern, v, z = (cache[name, 1] for name in ("pattern", "v", "z"))
    assert v.shape[1] == IDS.shape[1]
    v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
    assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, atol=1e-4)


def test_queries_before_and_after_the_rotary_embedding() -> None:
    hf, model = of("gpt2")
    block = hf.transformer.h[1]
    made = hooked(hf, lambda: hf(IDS), {"c_attn": (block.attn.c_attn, "output")})["c_attn"]
    queries = made.split(model.cfg.d_model, -1)[0].unflatten(-1, (model.cfg.n_heads, -1))
    with torch.no_grad():
        _, cache = model.run_with_cache(IDS, "blocks.1.attn.hook_q")
    assert [*cache] == ["blocks.1.attn.hook_q"]
    assert torch.allclose(cache["q", 1], queries, atol=1e-5)
    with pytest.raises(NotInThisModelError, match=r"has no rotary embedding; .* is blocks\.1\.attn\.hook_q\.$"):
        model.run_with_cache(IDS, "blocks.1.attn.hook_rot_q")
    _, turned = of("llama")
    assert "blocks.1.attn.hook_rot_q" in turned.hook_dict
    with pytest.raises(
        NotInThisModelError,
        match=r"turns queries and keys by their positions, or norms them; .* is blocks\.1\.attn\.hook_rot_q\.$",
    ):
        turned.run_with_cache(IDS, "blocks.1.attn.hook_q")


def test_where_the_projection_is_not_known_that_is_the_reason() -> None:
    model = HookedTransformer(StandardizedTransformer(zoo.build("deepseek_v3")))
    with pytest.raises(
        NotInThisModelError, match=r"does not show what its queries are before a rotary embedding or norm \(W_Q"
    ):
        model.run_with_cache(torch.tensor([[1, 2, 3]]), "blocks.1.attn.hook_q")


@pytest.mark.parametrize("in_place", [True, False])
def test_hooks_change_what_goes_on(in_place: bool) -> None:
    hf, model = of("llama")
    layer = hf.model.layers[1]
    seen: list[str] = []

    def hook(value: Tensor, hook: HookPoint) -> Tensor | None:
        seen.append(f"{hook.name} {hook.layer()}")
        if in_place:
            value[:, -1] = 0
            return None
        return torch.cat([value[:, :-1], torch.zeros_like(value[:, -1:])], 1)

    def naive(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, -1] = 0
        return value

    with torch.no_grad():
        plain = hf(IDS).logits
        found = model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_resid_post", hook)])
        assert torch.equal(model(IDS), plain)
    assert seen == ["blocks.1.hook_resid_post 1"]
    assert torch.allclose(found, edited(lambda: hf(IDS), layer, "output", naive).logits, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_head_of_the_values_is_taken_out() -> None:
    """Values have the position before the head there."""
    hf, model = of("gpt2")

    def hook(value: Tensor, hook: HookPoint) -> Tensor:
        value[:, :, 1] = 0
        return value

    def naive(value: Tensor) -> Tensor:
        value = value.clone()
        width = model.cfg.d_head
        value[..., 2 * model.cfg.d_model + width : 2 * model.cfg.d_model + 2 * width] = 0
        return value

    with torch.no_grad():
        found = model.run_with_hooks(IDS, fwd_hooks=[(lambda name: name.endswith("1.attn.hook_v"), hook)])
    expected = edited(lambda: hf(IDS), hf.transformer.h[1].attn.c_attn, "output", naive).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_hooks_stay_until_they_are_taken_off_and_see_each_other() -> None:
    hf, model = of("llama")
    with torch.no_grad():
        plain = hf(IDS).logits
        model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: 2 * value)
        twice = model(IDS)
        with model.hooks([("blocks.0.hook_mlp_out", lambda value, hook: value / 2)]):
            assert torch.allclose(model(IDS), plain, atol=1e-5)
            _, cache = model.run_with_cache(IDS)
        assert torch.equal(model(IDS), twice)
        _, edited_cache = model.run_with_cache(IDS)
        model.reset_hooks()
        assert torch.equal(model(IDS), plain)
    assert torch.allclose(edited_cache["mlp_out", 0], 2 * cache["mlp_out", 0], atol=1e-5)
    assert not torch.allclose(twice, plain, atol=1e-2)


def test_a_backward_hook_is_told_the_gradient() -> None:
    hf, model = of("llama")
    found: list[Tensor] = []
    loss = model.run_with_hooks(
        IDS, "loss", bwd_hooks=[("blocks.1.hook_resid_post", lambda gradient, hook: found.append(gradient.clone()))]
    )
    loss.backward()
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    hf.zero_grad()
    handle = hf.model.layers[1].register_forward_hook(keep)
    logits = hf(IDS).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    expected.backward()
    handle.remove()
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(found[0], kept[0].grad, atol=1e-6)


def test_texts_and_weights() -> None:
    model = HookedTransformer.from_pretrained("demo:llama", fold_ln=False)
    begin = model.tokenizer.bos_token_id
    tokens = model.to_tokens("The capital of France is")
    assert (tokens[0, 0] == begin) == (begin is not None)
    assert "".join(model.to_str_tokens("The capital of France is")).endswith("The capital of France is")
    assert model.to_tokens(tokens[0]).shape == tokens.shape
    paris = model.to_single_token(" Paris")
    with torch.no_grad():
        assert int(model("The capital of France is")[0, -1].argmax()) == paris
        loss, per_token = (model(tokens, "loss", loss_per_token=one) for one in (False, True))
        logits, again = model(tokens, "both")
        assert torch.allclose(loss, per_token.mean())
        assert torch.equal(loss, again)
        assert torch.equal(model(tokens), logits)
    assert model.generate("The capital of France is", 1, do_sample=False).endswith(" Paris")
    inside = model.model
    assert model.W_Q.shape == (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model, model.cfg.d_head)
    assert model.W_K.shape == model.W_Q.shape
    assert torch.equal(model.W_V[2, -1], inside.W_V[2][-1])
    assert torch.equal(model.W_U, inside.W_U)
    assert torch.equal(model.W_out[1], inside.W_out[1])


def test_short_names() -> None:
    names = {"q": "attn.hook_q", "attn": "attn.hook_pattern", "post": "mlp.hook_post", "resid_mid": "hook_resid_mid"}
    for short, full in names.items():
        assert get_act_name(short, 3) == f"blocks.3.{full}"
    assert get_act_name("embed") == "hook_embed"
    assert get_act_name("blocks.1.hook_mlp_out") == "blocks.1.hook_mlp_out"
    for short, full in {"k6": "attn.hook_k", "scale6ln1": "ln1.hook_scale", "resid_post6": "hook_resid_post"}.items():
        assert get_act_name(short) == f"blocks.6.{full}"
    assert [get_act_name(one) for one in ("scale", "normalized")] == ["ln_final.hook_scale", "ln_final.hook_normalized"]
    assert get_act_name("resid_pre", 2, "block") == "blocks.2.hook_resid_pre"


def test_what_is_refused() -> None:
    _, model = of("llama")
    assert isinstance(model.run_with_cache(IDS, "hook_embed")[1], ActivationCache)
    for name, why in {
        "blocks.0.ln1.hook_scale": ": what a norm divides by is in the norm's own code",
        "blocks.99.hook_resid_post": ": layers are 0 to 2",
        "hook_resid_post": r" \(did you mean blocks\.LAYER\.hook_resid_post\?\)",
        "blocks.0.hook_pattern": r" \(did you mean blocks\.0\.attn\.hook_pattern\?\)",
        "resid_pots": r" \(did you mean blocks\.LAYER\.hook_resid_post\?\)",
        "blocks.0.hook_embed": ": hook_embed has no layer",
        "blocks.0.xyz": "",
    }.items():
        with pytest.raises(
            InputError,
            match=f"is no hook name here{why}. A model of 3 layers has hook_embed, hook_pos_embed, "
            "ln_final.hook_normalized, and blocks.LAYER",
        ):
            model.add_hook(name, print)
    with pytest.raises(InputError, match=r"^fold_ln=True: models are left as they are"):
        HookedTransformer.from_pretrained("demo:gpt2", fold_ln=True)
    with pytest.raises(InputError, match=r"^return_type='probs': give"):
        model(IDS, "probs")
    with pytest.raises(KeyError, match="names_filter left it out"):
        model.run_with_cache(IDS, "hook_embed")[1]["resid_post", 1]
    with pytest.raises(AttributeError, match=r"has no 'lalala'\. Everything else is at the model inside, `\.model`"):
        model.lalala


@pytest.mark.parametrize(
    ("name", "hook", "said"),
    [
        (
            "attn.hook_v",
            lambda v, hook: v.transpose(1, 2),
            r"of \(2, 9, 2, 8\); the hook <lambda> .* of \(2, 2, 9, 8\)\.",
        ),
        (
            "hook_resid_post",
            lambda v, hook: v[:, -1],
            r"returned torch\.float32 of \(2, 32\)\. Return all of the value",
        ),
        ("hook_resid_post", lambda v, hook: v > 0, r"returned torch\.bool of"),
        ("hook_resid_post", lambda v, hook: (v,), r"returned a tuple\. Return all"),
    ],
)
def test_what_a_hook_returns_is_checked(name: str, hook: Any, said: str) -> None:
    _, model = of("llama")
    with pytest.raises(InputError, match=rf"blocks\.1\.{re.escape(name)}.*{said}"):
        model.run_with_hooks(IDS, fwd_hooks=[(f"blocks.1.{name}", hook)])


def test_wrong_arguments_of_a_call() -> None:
    _, model = of("gpt2")
    calls: dict[str, Any] = {
        r"fwd_hooks are pairs of .*; found 'hook_embed'\.$": lambda: model._put_on(("hook_embed", print), ()),
        r"bwd_hooks are pairs of .*; found \('hook_embed', 7\)\.$": lambda: model._put_on((), [("hook_embed", 7)]),
        r"names_filter: found an int: give a hook name": lambda: model._asked(7),
        r"name_filter=.*There is names_filter\.$": lambda: model.run_with_cache(IDS, name_filter="hook_embed"),
        r"incl_bwd=.*dir=\"bwd\"": lambda: model.run_with_cache(IDS, incl_bwd=True),
        r"fwd_hooks=.*run_with_hooks, and not": lambda: model(IDS, fwd_hooks=[]),
        r"attention_mask is of \(1, 3\) and the ids of": lambda: model(IDS, attention_mask=torch.ones(1, 3)),
        r"cache\[3\]: give a hook name": lambda: model.run_with_cache(IDS, "hook_embed")[1][3],
    }
    for said, call in calls.items():
        with pytest.raises(InputError, match=said):
            call()


def test_a_loaded_model_and_its_mask() -> None:
    hf = HookedTransformer.from_pretrained("demo:gpt2").model.hf_model
    model = HookedTransformer.from_pretrained("demo:gpt2", hf_model=hf)
    assert model.model.hf_model is hf
    ids = model.to_tokens("The capital of France")
    mask = torch.ones_like(ids)
    mask[0, 1] = 0
    with torch.no_grad():
        expected = hf(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        assert torch.equal(model("The capital of France", attention_mask=mask), expected)
    for given in ([1, 2], [], None):
        with pytest.raises(
            InputError, match=r"where a text is wanted: give a text, a list of texts, or ids as a tensor"
        ):
            model(given)


def test_the_page_runs_and_has_all_hook_names() -> None:
    page = (Path(__file__).parents[2] / "docs" / "from_transformer_lens.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "<from_transformer_lens.md>", "exec"), {})
    rows = [row.split("|")[1:3] for row in page.split("## Weights")[0].splitlines() if row.startswith("|")]
    table = {name.split("blocks.i.")[-1]: where for names, where in rows for name in re.findall(r"`([^`]+)`", names)}
    for name, standard in HOOKS.items():
        assert standard in table.get(name, table.get(name.split(".")[-1], ""))


def test_a_name_that_is_asked_of_the_class() -> None:
    with pytest.raises(
        AttributeError,
        match=r"^StandardizedTransformer has no from_pretrained\. What TransformerLens calls 'from_pretrained' is ",
    ) as caught:
        StandardizedTransformer.from_pretrained("demo:gpt2")  # type: ignore[attr-defined]
    assert "StandardizedTransformer(id, folder or model)" in str(caught.value)
    assert not hasattr(StandardizedTransformer, "from_pretrained")


def test_a_name_of_another_library_is_answered_with_the_one_here() -> None:
    model = StandardizedTransformer(build("gpt2"))
    for (library, room), names in ROOMS.items():
        for name, here in names.items():
            with pytest.raises(NoSuchModuleError) as caught:
                getattr(model, name)
            assert str(caught.value).endswith(f" What {library} calls {name!r} is here: {here}. {room} has its names.")
    with pytest.raises(
        NoSuchModuleError, match=r"What nnterp calls 'model' is here: .*nnatomy\.compat\.nnterp has its names"
    ):
        model.model.layers[0]  # type: ignore[union-attr]
    assert StandardizedTransformer(build("llama")).model.layers is not None  # where it is the model's own
    lens, sight, terp = (import_module(room) for _, room in ROOMS)  # where they are
    assert callable(lens.HookedTransformer.run_with_hooks)
    assert hasattr(sight.LanguageModel, "generator")
    assert terp.StandardizedTransformer(build("gpt2")).model.layers is not None
    for name in (
        "num_layers",
        "num_heads",
        "hidden_size",
        "vocab_size",
        "config",
        "without_edits",
        "project_on_vocab",
        "W_Q",
        "QK",
        "OV",
    ):
        assert hasattr(model, name)
