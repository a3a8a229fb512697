"""TransformerLens's cache, patching, head detector, FactoredMatrix and tokens against naive formulas and plain hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import build, prompt_ids
from reference import edited
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.compat.transformer_lens import (
    ActivationCache,
    FactoredMatrix,
    HookedTransformer,
    SVDInterpreter,
    head_detector,
    patching,
    utils,
)
from nnatomy.errors import InputError, NotInThisModelError

IDS = prompt_ids(seed=3)


@pytest.fixture(scope="module")
def hf() -> Any:
    return build("gpt2")


@pytest.fixture(scope="module")
def model(hf: Any) -> HookedTransformer:
    return HookedTransformer(StandardizedTransformer(hf))


@pytest.fixture(scope="module")
def cache(model: HookedTransformer) -> ActivationCache:
    with torch.no_grad():
        return model.run_with_cache(IDS)[1]


@pytest.fixture(scope="module")
def demo() -> HookedTransformer:
    return HookedTransformer.from_pretrained("demo:gpt2")


def test_parts_sum_to_the_stream(model: HookedTransformer, cache: ActivationCache) -> None:
    count = model.cfg.n_layers
    for layer in (1, count):
        stream = cache["resid_post", layer - 1]
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        assert labels[:4] == ["embed", "pos_embed", "0_attn_out", "0_mlp_out"]
        assert torch.allclose(parts.sum(0), stream, atol=1e-4)
        heads, labels = cache.stack_head_results(layer, return_labels=True, incl_remainder=True)
        assert labels[:2] == ["L0H0", "L0H1"]
        assert torch.allclose(heads.sum(0), stream, atol=1e-4)
        full = cache.get_full_resid_decomposition(layer, pos_slice=-1)
        assert torch.allclose(full.sum(0), stream[:, -1], atol=1e-4)
    one = torch.einsum("bshd,hdm->bshm", cache["z", 1], model.W_O[1])
    assert torch.allclose(cache.stack_head_results(2)[model.cfg.n_heads], one[:, :, 0], atol=1e-5)
    neurons = cache["post", 1][..., None] * model.W_out[1]
    assert torch.allclose(cache.get_neuron_results(1), neurons, atol=1e-5)
    direction = torch.randn(model.cfg.d_model)
    projected = cache.stack_neuron_results(2, pos_slice=0, project_output_onto=direction)
    assert torch.allclose(projected[neurons.shape[-2] :].T, neurons[:, 0] @ direction, atol=1e-4)
    states, labels = cache.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid"]
    assert torch.equal(states[3], cache["resid_mid", 1])


def test_what_parts_add_to_a_logit(hf: Any, model: HookedTransformer, cache: ActivationCache) -> None:
    """The final norm by hand, with the scale of the whole stream."""
    norm, whole = hf.transformer.ln_f, cache["resid_post", -1][:, -1]
    scale = (whole.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    parts = cache.decompose_resid(pos_slice=-1)
    by_hand = (parts - parts.mean(-1, keepdim=True)) / scale * norm.weight
    assert torch.allclose(cache.apply_ln_to_stack(parts, pos_slice=-1), by_hand, atol=1e-4)
    tokens, wrong = torch.tensor([3, 5]), torch.tensor([4, 9])
    directions = hf.lm_head.weight[tokens] - hf.lm_head.weight[wrong]
    found = cache.logit_attrs(parts, tokens, wrong, pos_slice=-1)
    assert torch.allclose(found, (by_hand * directions).sum(-1), atol=1e-4)
    one = cache.logit_attrs(parts, tokens[1], wrong[1], pos_slice=-1, batch_slice=1)
    assert torch.allclose(one, found[:, 1], atol=1e-4)
    with torch.no_grad():
        logits = hf(IDS).logits[:, -1]
    rows = torch.arange(2)
    difference = logits[rows, tokens] - logits[rows, wrong]
    assert torch.allclose(found.sum(0) + (directions * norm.bias).sum(-1), difference, atol=1e-3)
    with pytest.raises(InputError, match="apply_ln is of the final norm alone"):
        cache.decompose_resid(1, apply_ln=True)
    with pytest.raises(InputError, match=r"tokens are \(2,\) and incorrect_tokens \(1,\): give as many"):
        cache.logit_attrs(parts, tokens, wrong[:1], pos_slice=-1)


def test_a_cache_of_some_positions_and_prompts(hf: Any, model: HookedTransformer, cache: ActivationCache) -> None:
    with torch.no_grad():
        _, last = model.run_with_cache(IDS, pos_slice=-1)
        _, alone = model.run_with_cache(IDS[:1], remove_batch_dim=True)
        stopped, before = model.run_with_cache(IDS, stop_at_layer=1)
        norm = hf.transformer.h[1].ln_2(cache["resid_mid", 1])
        up = hf.transformer.h[1].mlp.c_fc(norm)
        final = hf.transformer.ln_f(cache["resid_post", -1])
    assert torch.equal(last["resid_post", 1], cache["resid_post", 1][:, -1:])
    assert torch.equal(last["pattern", 1], cache["pattern", 1][:, :, -1:])
    assert torch.allclose(alone["q", 1], cache["q", 1][0], atol=1e-5)
    assert torch.equal(stopped, cache["resid_pre", 1])
    assert "blocks.0.hook_resid_post" in before
    assert "blocks.1.hook_resid_pre" not in before
    assert torch.allclose(cache["normalized", 1, "ln2"], norm, atol=1e-5)
    assert torch.allclose(cache["pre", 1], up, atol=1e-5)
    assert torch.allclose(cache["ln_final.hook_normalized"], final, atol=1e-5)
    assert torch.allclose(cache["embed"] + cache["pos_embed"], cache["resid_pre", 0], atol=1e-6)
    assert torch.equal(model.W_pos, hf.transformer.wpe.weight)
    some = cache.apply_slice_to_batch_dim([1])
    assert torch.equal(some["resid_post", 0], cache["resid_post", 0][1:])
    with pytest.raises(AssertionError, match="Cannot remove batch dimension"):
        ActivationCache(cache.cache_dict, model).remove_batch_dim()
    with pytest.raises(
        InputError, match=r"hook_pre is computed from a value and a weight, so that a hook cannot change it"
    ):
        model.add_hook("blocks.0.mlp.hook_pre", print)


def test_hooks_of_each_kind(hf: Any, model: HookedTransformer) -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        return lambda value, hook: order.append(name)

    model.add_perma_hook("hook_embed", named("permanent"))
    model.blocks[1].attn.hook_z.add_hook(named("z"))
    model.add_hook("hook_embed", named("first"), prepend=True)
    with torch.no_grad(), model.hooks([("hook_embed", named("within"))]):
        model(IDS)
        model.reset_hooks(level=1)
        model(IDS)
    assert order == ["first", "permanent", "within", "z", "first", "permanent", "z"]
    model.reset_hooks()
    assert model.hook_dict["hook_embed"].has_hooks()
    model.reset_hooks(including_permanent=True)
    assert not any(point.has_hooks() for point in model.hook_dict.values())

    def shifted(value: Tensor, hook: Any) -> Tensor:
        return value + 1

    with torch.no_grad():
        found = model.run_with_hooks(IDS, fwd_hooks=[("hook_pos_embed", shifted)])
    expected = edited(lambda: hf(IDS), hf.transformer.wpe, "output", lambda value: value + 1).logits
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "short", "axis"),
    [
        (patching.get_act_patch_resid_pre, "resid_pre", None),
        (patching.get_act_patch_attn_head_out_by_pos, "z", 2),
        (patching.get_act_patch_attn_head_pattern_all_pos, "pattern", 1),
    ],
)
def test_patching_each_place(model: HookedTransformer, function: Any, short: str, axis: int | None) -> None:
    clean, corrupted = IDS[:1], prompt_ids(seed=8)[:1]
    with torch.no_grad():
        _, kept = model.run_with_cache(clean)
        found = function(model, corrupted, kept, lambda logits: logits[0, -1, 7])
        heads = () if axis is None else (model.cfg.n_heads,)
        positions = () if function.__name__ == "function" and short == "pattern" else (clean.shape[1],)
        assert found.shape == (model.cfg.n_layers, *positions, *heads)

        def put(value: Tensor, hook: Any) -> Tensor:
            places = {"resid_pre": (slice(None), 2), "z": (slice(None), 2, 1), "pattern": (slice(None), 1)}
            value[places[short]] = kept[short, 1][places[short]]
            return value

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(utils.get_act_name(short, 1), put)])
    index = {"resid_pre": (1, 2), "z": (1, 2, 1), "pattern": (1, 1)}[short]
    assert torch.allclose(found[index], logits[0, -1, 7], atol=1e-5)


def test_patching_patterns_by_position_and_all_of_it() -> None:
    """Positions are behind heads there, as in TransformerLens; key-value heads that there are not are 0."""
    model = HookedTransformer(StandardizedTransformer(build("llama")))
    clean, corrupted = IDS[:1, :4], prompt_ids(seed=8)[:1, :4]

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 7]

    layers, heads, size = model.cfg.n_layers, model.cfg.n_heads, clean.shape[1]
    with torch.no_grad():
        _, kept = model.run_with_cache(clean)
        by_row = patching.get_act_patch_attn_head_pattern_by_pos(model, corrupted, kept, metric)
        by_entry = patching.get_act_patch_attn_head_pattern_dest_src_pos(model, corrupted, kept, metric)
        assert by_row.shape == (layers, heads, size)
        assert by_entry.shape == (layers, heads, size, size)

        def put(value: Tensor, hook: Any) -> None:
            value[:, 1, 3] = kept["pattern", 0][:, 1, 3]

        def put_one(value: Tensor, hook: Any) -> None:
            value[:, 1, 3, 0] = kept["pattern", 0][:, 1, 3, 0]

        name = "blocks.0.attn.hook_pattern"
        for found, hook in ((by_row[0, 1, 3], put), (by_entry[0, 1, 3, 0], put_one)):
            assert torch.allclose(found, metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, hook)])), atol=1e-5)
        every = patching.get_act_patch_attn_head_by_pos_every(model, corrupted, kept, metric)
        assert torch.equal(every[4], by_row.mT)
        values = patching.get_act_patch_attn_head_v_by_pos(model, corrupted, kept, metric)
        assert torch.equal(every[3, ..., : values.shape[-1]], values)
        assert not every[3, ..., values.shape[-1] :].any()
        assert patching.get_act_patch_attn_head_all_pos_every(model, corrupted, kept, metric).shape == (
            5,
            layers,
            heads,
        )
        for ids, score, said in (
            (corrupted[:, :3], metric, r"of \(1, 3\), and resid_pre of layer 0 in clean_cache of \(1, 4, "),
            ("a text", metric, r"corrupted_tokens is a str: give ids"),
            (corrupted, lambda logits: logits[0, 0], r"patching_metric returned \(\d+,\): it makes one number"),
        ):
            with pytest.raises(InputError, match=said):
                patching.get_act_patch_resid_pre(model, ids, kept, score)


def test_sums_of_the_stream_that_there_are_not(demo: HookedTransformer) -> None:
    with torch.no_grad():
        _, cache = demo.run_with_cache("The capital of France is")
    for said, call in {
        r"layer=99: give 0 to 6": lambda: cache.accumulated_resid(99),
        r"layer=-99: give 0 to": lambda: cache.stack_head_results(-99),
        r"mode='heads': it is 'all'": lambda: cache.decompose_resid(mode="heads"),
        r"behind its first axis the stream is of \(1, 6, 96\): give the pos_slice": lambda: cache.logit_attrs(
            cache.stack_head_results(pos_slice=-1), 5
        ),
    }.items():
        with pytest.raises(InputError, match=said):
            call()
    stack = cache.stack_head_results(pos_slice=-1)
    by_text = cache.logit_attrs(stack, [" Paris"], [" Tokyo"], pos_slice=-1)
    assert torch.equal(by_text, cache.logit_attrs(stack, " Paris", " Tokyo", pos_slice=-1))


def test_queries_of_a_rotary_model_are_patched_where_they_are() -> None:
    model = HookedTransformer(StandardizedTransformer(build("llama")))
    with torch.no_grad():
        name = next(one for one in model.hook_dict if one.endswith("hook_rot_q"))
        _, kept = model.run_with_cache(IDS[:1], lambda one: one.endswith("hook_rot_q"))
        found = patching.get_act_patch_attn_head_q_all_pos(
            model, prompt_ids(seed=8)[:1], kept, lambda logits: logits.sum()
        )
    assert found.shape == (model.cfg.n_layers, model.cfg.n_heads)
    assert name in kept


def test_head_detector(demo: HookedTransformer) -> None:
    text = "Japan is in Asia. Japan is in Asia."
    tokens = demo.to_tokens(text)
    with torch.no_grad():
        pattern = demo.run_with_cache(tokens, lambda name: name.endswith("hook_pattern"))[1]["pattern", 1][0, 2]
    ids, size = tokens[0].tolist(), tokens.shape[1]
    wanted = torch.tensor(
        [[float(k >= 1 and k <= q and ids[k - 1] == ids[q]) for k in range(size)] for q in range(size)]
    )
    wanted *= torch.tensor([[float(k <= q) for k in range(size)] for q in range(size)])
    assert torch.equal(head_detector.get_induction_head_detection_pattern(tokens), wanted)
    scores = head_detector.detect_head(demo, text, "induction_head", heads=[(1, 2)])
    assert torch.allclose(scores[1, 2], (pattern * wanted).sum() / pattern.sum(), atol=1e-5)
    assert (scores == -1).sum() == scores.numel() - 1
    apart = head_detector.detect_head(
        demo, text, "previous_token_head", heads={1: [2]}, error_measure="abs", exclude_bos=True
    )
    differ = (pattern - torch.ones(size - 1).diag(-1)).abs()
    differ[:, 0] = 0
    assert apart[1, 2] == pytest.approx(1 - float(differ.sum(-1).mean()), abs=1e-3)
    with pytest.raises(AssertionError, match="not lower triangular"):
        head_detector.detect_head(demo, text, torch.ones(size, size))
    cache = demo.run_with_cache(tokens)[1]
    assert torch.equal(head_detector.detect_head(demo, text, "induction_head", [(1, 2)], cache), scores)
    with pytest.raises(InputError, match="cache= is of one text, and seq is a list of 2: leave it out"):
        head_detector.detect_head(demo, [text, text], "induction_head", cache=cache)


def test_factored_matrices(model: HookedTransformer) -> None:
    a, b, c = torch.randn(3, 6, 2), torch.randn(3, 2, 5), torch.randn(3, 5, 4)
    product = FactoredMatrix(a, b)
    assert torch.allclose((product @ c).AB, a @ b @ c, atol=1e-5)
    assert (product @ FactoredMatrix(c, torch.randn(3, 4, 1))).mdim == 2
    assert torch.allclose((2 * product).AB, 2 * a @ b, atol=1e-5)
    assert torch.allclose(product.U @ torch.diag_embed(product.S) @ product.V.mT, a @ b, atol=1e-5)
    assert torch.allclose(product.make_even().AB, a @ b, atol=1e-5)
    assert torch.allclose(product[1, -1, 2].AB, (a @ b)[1, -1, 2].reshape(1, 1), atol=1e-5)
    assert torch.allclose(product.norm(), (a @ b).norm(dim=(-2, -1)), atol=1e-4)
    with pytest.raises(AssertionError, match="the inner sizes differ"):
        FactoredMatrix(a, c)
    assert torch.allclose(model.OV[1, 2].AB, model.W_V[1, 2] @ model.W_O[1, 2], atol=1e-4)
    vectors = SVDInterpreter(model).get_singular_vectors("w_out", 1, 3)
    right = torch.linalg.svd(model.W_out[1])[2][:3]
    assert torch.allclose(vectors[:, 0].abs(), (right @ model.W_U).T.abs(), atol=1e-3)
    assert torch.allclose(
        model.accumulated_bias(1, mlp_input=True), model.model.b_O[0] + model.model.b_O[1] + model.model.b_out[0]
    )


def test_texts_of_several_lengths_are_masked(demo: HookedTransformer) -> None:
    texts = ["Japan is in", "The capital of France is"]
    with torch.no_grad():
        logits, loss = demo(texts, "both")
        alone = [demo(text, "both") for text in texts]
        lengths = [demo.to_tokens(text).shape[1] for text in texts]
        for row, (one, _) in enumerate(alone):
            assert torch.allclose(logits[row, : lengths[row]], one[0], atol=1e-4)
        total = sum(float(one) * (length - 1) for (_, one), length in zip(alone, lengths, strict=True))
        assert float(loss) == pytest.approx(total / (sum(lengths) - 2), abs=1e-4)
        written = demo.generate(texts, 3, do_sample=False)
        assert written == [demo.generate(text, 3, do_sample=False) for text in texts]
        ids = demo.generate(demo.to_tokens(texts[0]), 2, do_sample=False)
    assert ids.shape == (1, lengths[0] + 2)
    tokens = demo.to_tokens(texts)
    assert tokens.shape == (2, max(lengths))
    assert demo.to_str_tokens(texts)[1] == demo.to_str_tokens(texts[1])
    assert demo.get_token_position(" France", texts[1]) == demo.to_str_tokens(texts[1]).index(" France")
    with pytest.raises(AssertionError, match="The token does not occur in the prompt"):
        demo.get_token_position(" France", texts[0])
    with pytest.raises(InputError, match="padding_side='left': ids alone would not say what is padding"):
        demo.to_tokens(texts, padding_side="left")


@pytest.mark.parametrize("pad", ["<|pad|>", "<|endoftext|>", None])
@pytest.mark.parametrize("begins", [True, False])
def test_the_mask_is_where_rows_are_filled_up(demo: HookedTransformer, pad: str | None, begins: bool) -> None:
    texts = ["Japan is in", "The capital of France is"]
    tokenizer = copy.deepcopy(demo.tokenizer)
    tokenizer.pad_token = pad
    model = HookedTransformer(StandardizedTransformer(demo.model.hf_model, tokenizer))
    tokens = model.to_tokens(texts, prepend_bos=begins)
    own = torch.tensor([model.to_tokens(text, prepend_bos=begins).shape[1] for text in texts])
    count = tokens.shape[1]
    at_the_end = (torch.arange(count) < own[:, None]).int()
    assert at_the_end[0].sum() < count
    for side in ("left", "right"):
        tokenizer.padding_side = side
        assert torch.equal(utils.get_attention_mask(tokenizer, tokens, prepend_bos=begins), at_the_end)
    tokenizer.padding_side = "left"
    fill = tokens[0, -1].item()
    rolled = torch.stack([tokens[0].roll(int(count - own[0])), tokens[1]])
    assert rolled[0, 0].item() == fill
    assert torch.equal(utils.get_attention_mask(tokenizer, rolled, prepend_bos=begins), at_the_end.flip(1))


def test_small_functions() -> None:
    values = torch.arange(12.0).view(3, 4)
    assert torch.equal(utils.Slice(-1).apply(values, 1), values[:, -1])
    assert torch.equal(utils.Slice((1, 3)).apply(values), values[1:3])
    assert torch.equal(utils.Slice([0, 2]).apply(values), values[[0, 2]])
    assert utils.Slice((1, 3)).indices(5).tolist() == [1, 2]
    with pytest.raises(InputError, match=r"Slice\('a'\): give an index"):
        utils.Slice("a")
    logits, tokens = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    by_hand = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(utils.lm_cross_entropy_loss(logits, tokens, per_token=True), by_hand, atol=1e-5)
    assert utils.is_lower_triangular(torch.ones(3, 3).tril())
    assert not utils.is_lower_triangular(torch.ones(3, 3))


def test_what_stands_for_what_is_not_there(model: HookedTransformer) -> None:
    with pytest.raises(AttributeError, match=r"has no 'set_use_split_qkv_input'\. What stands for it: queries"):
        model.set_use_split_qkv_input(True)
    with pytest.raises(InputError, match=r"was given a dict: give a StandardizedTransformer"):
        HookedTransformer({"n_layers": 1})
    with pytest.raises(InputError, match=r"^past_kv_cache=\.\.\.: that is of a network of TransformerLens's own"):
        model(IDS, past_kv_cache=None)
    with pytest.raises(InputError, match=r"^lalala=\.\.\.: there is no such option"):
        model(IDS, lalala=1)
    with pytest.raises(NotInThisModelError, match="no module of this model gives rows that are added"):
        HookedTransformer(StandardizedTransformer(build("llama"))).add_hook("hook_pos_embed", print)
    with pytest.raises(AttributeError, match=r"Here are W_in, .*hooks, and no 'W_Q'"):
        model.blocks[0].mlp.W_Q
