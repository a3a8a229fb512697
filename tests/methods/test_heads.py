"""Head scores against loops over the model's own patterns, ablation against plain hooks on the output projection."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from architectures import PLACES, build, prompt_ids, shared
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.methods import head_ablation, head_scores, logit_difference

METRIC, ONE = logit_difference([20, 30], [40, 50]), logit_difference(20, 40)
#: The projection of what the heads give.
OUT = {"llama": "o_proj", "gpt2": "c_proj", "gemma2": "o_proj", "gpt_oss": "o_proj", "bloom": "dense"}
#: Tokens that come again, at once and later.
PROMPTS = [[5, 6, 6, 7, 5, 6, 8], [9, 5, 9, 5]]


def naive(patterns: list[Tensor], prompts: list[list[int]], kind: str) -> Tensor:
    """The mean of what queries give to their targets; the patterns of a layer are (prompt, head, query, key), padded left."""
    found: list[Tensor] = []
    for row, ids in enumerate(prompts):
        pad = max(map(len, prompts)) - len(ids)
        for q in range(len(ids)):
            targets = {
                "previous_token": [q - 1] if q else [],
                "duplicate_token": [k for k in range(q) if ids[k] == ids[q]],
                "induction": [k for k in range(1, q + 1) if ids[k - 1] == ids[q]],
            }[kind]
            if targets:
                found.append(torch.stack([p[row, :, pad + q, [pad + k for k in targets]].sum(-1) for p in patterns]))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_are_the_means_of_the_patterns(model_type: str, batch_size: int) -> None:
    hf = build(model_type)
    hf.set_attn_implementation("eager")
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in PROMPTS])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in PROMPTS])
    places = {} if model_type == "bloom" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        patterns = list(hf(ids, attention_mask=mask, output_attentions=True, **places).attentions)
    for implementation in ("eager", "sdpa") if hf._supports_sdpa else ("eager",):
        hf.set_attn_implementation(implementation)
        found = head_scores(StandardizedTransformer(hf), PROMPTS, batch_size=batch_size)
        for kind, scores in found.items():
            assert torch.allclose(scores.effect, naive(patterns, PROMPTS, kind), atol=1e-5)
            assert scores.effect.std() > 0


def test_without_a_target_there_is_no_score() -> None:
    found = head_scores(StandardizedTransformer(shared("llama")), [[5, 6, 7]])
    assert found["duplicate_token"].effect.isnan().all()
    assert found["duplicate_token"].top() == []
    assert not found["previous_token"].effect.isnan().any()


def test_random_tokens_come_twice() -> None:
    model = StandardizedTransformer("demo:llama")
    first, again, other = (head_scores(model, seed=seed)["induction"].effect for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_head_map_names_heads() -> None:
    scores = head_scores(StandardizedTransformer(shared("llama")), PROMPTS)["previous_token"]
    (name, value), *_ = scores.top(3)
    layer, head = divmod(int(scores.effect.argmax()), scores.effect.shape[1])
    assert (name, value) == (f"L{layer}H{head}", float(scores.effect.max()))
    assert name in repr(scores)
    assert "Attention to previous token" in repr(scores)
    figure = scores.plot()
    assert figure.data[0].z.shape == scores.effect.shape
    assert figure.layout.title.text == f"Attention to previous token: '{PROMPTS[0]}' / '{PROMPTS[1]}'"


def by_hooks(hf: Any, model_type: str, layer: int, head: int, how: str, heads: int) -> Tensor:
    ids = prompt_ids(seed=1)
    block = hf.get_submodule(PLACES[model_type][0])[layer]
    (out,) = [module for name, module in block.named_modules() if name.endswith(OUT[model_type]) and "mlp" not in name]

    def take_out(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone().unflatten(-1, (heads, -1))
        x[:, :, head] = x[:, :, head].mean((0, 1)) if how == "mean" else 0
        return (x.flatten(-2),)

    handle = out.register_forward_pre_hook(take_out)
    with torch.no_grad():
        logits = hf(ids).logits[:, -1]
    handle.remove()
    return METRIC(logits)


@pytest.mark.parametrize("model_type", OUT)
@pytest.mark.parametrize("how", ["zero", "mean"])
def test_ablation_is_a_pass_without_the_head(model_type: str, how: Any) -> None:
    hf = shared(model_type)
    found = head_ablation(StandardizedTransformer(hf), prompt_ids(seed=1), metric=METRIC, how=how, progress=False)
    _, layers, heads = found.effect.shape
    assert found.heads == tuple(range(heads))
    expected = torch.stack(
        [torch.stack([by_hooks(hf, model_type, i, h, how, heads) for h in range(heads)], -1) for i in range(layers)], 1
    )
    with torch.no_grad():
        base = METRIC(hf(prompt_ids(seed=1)).logits[:, -1])
    assert torch.allclose(found.base, base, atol=1e-4)
    assert (found.effect - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (expected - base[:, None, None]).abs().max() > 1e-2 * expected.abs().max()
    assert torch.allclose(found.change.effect, (expected - base[:, None, None]).mean(0), atol=1e-3)


def test_prompts_of_other_lengths_have_the_mean_of_their_own_tokens() -> None:
    hf = shared("llama")
    model = StandardizedTransformer(hf)
    found = head_ablation(model, PROMPTS, metric=ONE, how="mean", layers=1, heads=[2], progress=False)
    out = hf.get_submodule(PLACES["llama"][0])[1].self_attn.o_proj
    kept: list[Tensor] = []
    handle = out.register_forward_pre_hook(
        lambda _, args: kept.append(args[0][0].unflatten(-1, (model.num_heads, -1))[:, 2])
    )
    with torch.no_grad():
        for one in PROMPTS:
            hf(torch.tensor([one]))
    handle.remove()
    mean = torch.cat(kept).mean(0)

    def put(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone().unflatten(-1, (model.num_heads, -1))
        x[:, :, 2] = mean
        return (x.flatten(-2),)

    handle = out.register_forward_pre_hook(put)
    with torch.no_grad():
        expected = [float(ONE(hf(torch.tensor([one])).logits[:, -1])) for one in PROMPTS]
    handle.remove()
    assert found.effect.flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert found.change.effect[:, :2].isnan().all()
    assert found.change.top()[0][0] == "L1H2"
    assert math.isnan(found.plot().data[0].z[0, 0])


def test_one_prompt_has_no_axis_of_prompts() -> None:
    model = StandardizedTransformer(shared("gpt2"))
    found = head_ablation(model, torch.tensor([PROMPTS[0]]), metric=ONE, layers=[0, 1], progress=False)
    several = head_ablation(model, [PROMPTS[0]], metric=ONE, layers=[0, 1], progress=False)
    assert found.effect.numel() == several.effect.numel() == 2 * model.num_heads
    assert found.effect.flatten().tolist() == several.effect.flatten().tolist()


def test_what_is_refused() -> None:
    model = StandardizedTransformer(shared("llama"))
    with pytest.raises(InputError, match=r"^how='median': give 'zero' or 'mean'\.$"):
        head_ablation(model, PROMPTS, metric=METRIC, how="median")
    with pytest.raises(InputError, match=r"^heads=\[99\]: heads_output has \d+ heads"):
        head_ablation(model, PROMPTS, metric=METRIC, heads=[99])
    with pytest.raises(NotInThisModelError):
        head_scores(StandardizedTransformer(zoo.build("rwkv")))
