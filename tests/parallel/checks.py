"""Checks of a model on several ranks against the same model in one process: `checks.py FOLDER CHECK...` on each rank.

It writes, by check, how it failed ("" where it held) into a file of the folder. A check is called `what[model type]`, or
`what[model type, a number]`.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import transformers
from architectures import build, prompt_ids
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NnatomyError, NotInThisModelError
from nnatomy.methods import activation_patching, direct_logit_attribution, logit_difference, logit_lens
from nnatomy.parallel import tp_plan

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
#: What of the configs is other than in `architectures`: sizes that ranks divide unevenly, or that have to be replicated.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 47},
    "qwen2": {"tie_word_embeddings": True},
    "llama-one-kv": {"num_key_value_heads": 1, "intermediate_size": 47},
    "qwen3-one-kv": {"num_key_value_heads": 1},
    "mistral-three-heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36},
    "llama-eager": {"attn_implementation": "eager"},
}
#: The names in the order in which a layer computes them; where its attention and MLP are parallel, what they add comes last.
ATTENTION = (
    *("layers_input", "attentions_input", "queries", "keys", "values", "attention_scores", "attention_probabilities"),
    *("values_weighted", "heads_output", "attentions_output", "mixers_output"),
)
MLP = ("mlps_input", "routers_logits", "routers_experts", "routers_weights", "neurons", "mlps_output")
ORDER = (
    *ATTENTION,
    "attentions_contribution",
    "mixers_contribution",
    "layers_mid",
    *MLP,
    "mlps_contribution",
    "layers_output",
)
#: In Cohere's, and in GPT-J's: the first addition is of the two, or of the stream and one of them.
PARALLEL = (*ATTENTION, *MLP, "layers_output")


def loaded(case: str) -> tuple[StandardizedTransformer, StandardizedTransformer]:
    """The model in one process, and on all ranks."""
    model_type = re.split(r"-", case)[0]
    folder = FOLDER / case
    if dist.get_rank() == 0 and not folder.exists():
        build(model_type, **CHANGES.get(case, {})).double().save_pretrained(folder)
    dist.barrier()
    options: dict[str, Any] = {"dtype": torch.float64}
    if "eager" in case or model_type == "gemma2":
        options["attn_implementation"] = "eager"
    config = transformers.AutoConfig.from_pretrained(folder)
    if any("expert" in name for name in vars(config)):
        options["experts_implementation"] = "eager"
    one = AutoModelForCausalLM.from_pretrained(folder, **options)
    rules = tp_plan(config, dist.get_world_size()) or "auto"
    split = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=rules)
    two = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split, **options)
    return StandardizedTransformer(one), StandardizedTransformer(two)


def points(model: StandardizedTransformer, names: tuple[str, ...] = ORDER) -> Iterator[tuple[str, int]]:
    """All that a model has of the names, in the order in which it computes them."""
    parallel = model.layers_mid.modules[0] is None
    for layer in range(model.num_layers):
        for name in PARALLEL if parallel else ORDER:
            accessor = getattr(model, name)
            if name in names and len(accessor) and accessor.modules[layer] is not None:
                yield name, layer


#: Types whose routers compute in float32, whatever the model's dtype: so gradients are, without nnatomy too.
IN_FLOAT32 = ("mixtral", "deepseek_v3")


def near(one: Any, other: Any, what: str, rounding: float = 1e-10) -> None:
    if isinstance(one, Tensor):
        off = rounding * max(1.0, float(one.detach().abs().max())) if rounding > 1e-10 else rounding
        torch.testing.assert_close(
            other, one, equal_nan=True, rtol=rounding, atol=off, msg=lambda text: f"{what}: {text}"
        )
    else:
        assert one == other, what


def changed(value: Tensor, seed: int = 0) -> Tensor:
    """Another value of that shape, that a model can go on with."""
    if not value.is_floating_point():  # experts
        return value.flip(-1)
    ramp = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).roll(seed).reshape(value.shape)
    return value * ramp


def reads(case: str) -> None:
    """Every name on every layer; reading changes nothing, bit for bit."""
    one, two = loaded(case)
    assert one.validation.counts == two.validation.counts, (one.validation, two.validation)
    assert two.num_heads == one.num_heads
    ids = prompt_ids()
    with torch.no_grad():
        seen = []
        for model in (one, two):
            with model.trace(ids, use_cache=False):
                found = {(name, i): getattr(model, name)[i].clone() for name, i in points(model)}
                found["logits", 0] = model.logits
                seen.append(found)
        assert len(seen[0]) > 10 * one.num_layers
        for point, value in seen[0].items():
            near(value, seen[1][point], str(point))
        plain = two.hf_model(ids, use_cache=False).logits
        assert torch.equal(plain, seen[1]["logits", 0]), "reading has changed the logits"
        for name, i in points(two):
            with two.trace(ids, use_cache=False):
                value = getattr(two, name)[i]
                assert torch.equal(two.logits, plain), f"reading {name}[{i}] has changed the logits"
            near(seen[0][name, i], value, f"{name}[{i}] alone")
        with two.trace(ids, use_cache=False):
            together = two.keys[:]
        for i, value in enumerate(together):
            near(seen[0]["keys", i], value, f"keys[{i}] of a slice")
        with torch.enable_grad(), two.trace(ids, use_cache=False):
            for name, i in points(two):
                getattr(two, name)[i]
            recorded = two.logits
        with torch.enable_grad():
            assert torch.equal(recorded, two.hf_model(ids, use_cache=False).logits), "reading has changed the logits"
        near(
            one.project_on_vocab(seen[0]["layers_output", 1]),
            two.project_on_vocab(seen[1]["layers_output", 1]),
            "the head",
        )


def writes(case: str) -> None:
    """Every name on a layer, put there or edited in place."""
    one, two = loaded(case)
    ids = prompt_ids()
    with torch.no_grad():
        plain = one.hf_model(ids).logits
        for name, i in points(one):
            if i != 1:
                continue
            for in_place in (False, True) if getattr(one, name).row.place != "input" else (False,):
                results = []
                for model in (one, two):
                    with model.trace(ids):
                        accessor = getattr(model, name)
                        if in_place:
                            accessor[i][..., 1:] = changed(accessor[i])[..., 1:]
                        else:
                            accessor[i] = changed(accessor[i])
                        results.append((model.layers_output[i], model.logits))
                near(results[0][0], results[1][0], f"{name}[{i}], in place: {in_place}: layers_output")
                near(results[0][1], results[1][1], f"{name}[{i}], in place: {in_place}: logits")
                if name != "routers_experts":  # their weights may follow them
                    assert not torch.equal(results[0][1], plain), f"{name}[{i}] has no effect"


def by_own_names(case: str) -> None:
    """What is split of the model's own modules is whole, or refused; read, put there and cached."""
    one, two = loaded(case)
    ids, results = prompt_ids(), []
    for model in (one, two):
        layer = model.layers[1]
        with torch.no_grad(), model.trace(ids, use_cache=False) as tracer:
            cache = tracer.cache([layer.self_attn.k_proj, layer.mlp.down_proj], include_inputs=True)
            layer.self_attn.q_proj.output = q = layer.self_attn.q_proj.output * 2
            given = layer.self_attn.o_proj.input
            layer.mlp.down_proj.input = n = layer.mlp.down_proj.input.flip(1)
            results.append([q, given, n, model.logits])
        for entries in cache.values():
            results[-1] += [entries[0].output, entries[0].inputs[0][0]]
    assert len(results[0]) == 8
    for k, (first, second) in enumerate(zip(*results, strict=True)):
        near(first, second, f"value {k}")

    def read() -> None:
        with two.trace(ids):
            two.layers[1].mlp.act_fn.output

    with_text(NotInThisModelError, "each of the 2 ranks has its own slice", read)


def gradients(case: str) -> None:
    """Of what is read, and through what is written."""
    one, two = loaded(case)
    rounding = 1e-6 if case in IN_FLOAT32 else 1e-10
    ids = prompt_ids()
    results = []
    for model in (one, two):
        wanted: dict[tuple[str, int], Tensor] = {}
        with model.trace(ids, use_cache=False):
            for name, i in points(model):
                value = getattr(model, name)[i]
                if value.is_floating_point() and value.requires_grad:
                    value.retain_grad()
                    wanted[name, i] = value
            loss = model.logits.sin().sum()
        loss.backward()
        model.hf_model.zero_grad()
        results.append({point: value.grad for point, value in wanted.items()})
    assert len(results[0]) > 6 * one.num_layers
    assert results[0].keys() == results[1].keys()
    for point, grad in results[0].items():
        assert (grad is None) == (results[1][point] is None), point
        if grad is not None:
            near(grad, results[1][point], f"gradient of {point}", rounding)
    for name in (
        "queries",
        "keys",
        "values",
        "attention_probabilities",
        "heads_output",
        "neurons",
        "routers_weights",
        "layers_mid",
    ):
        if (name, 1) not in points(one):
            continue
        grads = []
        for model in (one, two):
            scale = torch.linspace(0.5, 1.5, 9, dtype=torch.float64).requires_grad_()
            with model.trace(ids, use_cache=False):
                value = getattr(model, name)[1]
                axis = getattr(model, name).row.seq
                where = [1] * value.ndim
                where[axis] = -1
                setattr_of(model, name, 1, value * scale.reshape(where).to(value.dtype))
                loss = model.logits.sin().sum()
            loss.backward()
            grads.append(scale.grad)
        near(grads[0], grads[1], f"gradient through {name}", rounding)


def setattr_of(model: Any, name: str, layer: int, value: Tensor) -> None:
    getattr(model, name)[layer] = value


def generations(case: str) -> None:
    """With the cache: what is read and written in each step, greedy and sampled."""
    one, two = loaded(case)
    ids = prompt_ids()
    names = [name for name in ("keys", "heads_output", "neurons", "routers_weights") if (name, 1) in points(one)]
    for sampled in (False, True):
        results = []
        for model in (one, two):
            torch.manual_seed(5 if model is one else 5 + dist.get_rank())  # the first rank's counts
            seen = []
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": sampled, "pad_token_id": 0}
            with torch.no_grad(), model.generate(ids, **options) as tracer:
                for step in tracer.iter[:]:
                    for name in names:
                        value = getattr(model, name)[1]
                        seen.append(value.clone())
                        if step == 0 and name == "keys":
                            value[:, :, 2] *= -1  # in the cache, too
                        elif name != "keys":
                            getattr(model, name)[1] = changed(value, step)
                tokens = tracer.result
            results.append((tokens, seen))
        assert torch.equal(results[0][0], results[1][0]), results
        for k, (first, second) in enumerate(zip(results[0][1], results[1][1], strict=True)):
            near(first, second, f"the {k}th value read")


def several_blocks(case: str) -> None:
    """Prompts of unequal length in blocks of their own, a cache, a lasting edit, and methods."""
    one, two = loaded(case)
    ids = prompt_ids().tolist()
    shorter = 6 if one.takes_padding else 9
    results = []
    for model in (one, two):
        with torch.no_grad():
            with model.trace() as tracer:
                with tracer.invoke(ids[0]):
                    pattern, heads = model.attention_probabilities[1], model.heads_output[1]
                with tracer.invoke(ids[1][:shorter]):
                    model.heads_output[1] = heads[:, :shorter]
                    logits = model.logits
            edited = model.edit(lambda model=model: setattr_of(model, "heads_output", 0, model.heads_output[0] * 2))
            with edited.trace(ids):
                doubled = edited.logits
            lens = logit_lens(model, ids)
            patched = activation_patching(
                model,
                clean=ids[:1],
                corrupted=ids[1:],
                metric=logit_difference(3, 4),
                layers=[1],
                positions=[-1],
                progress=False,
            ).effect
        parts = direct_logit_attribution(model, ids, answer=3, by="head").effect
        results.append((pattern, heads, logits, doubled, lens, patched, parts))
    for k, (first, second) in enumerate(zip(*results, strict=True)):
        near(first, second, f"result {k}")


def programs(case: str, seeds: int) -> None:
    """Random programs of reads and writes."""
    one, two = loaded(case)
    for seed in range(seeds):
        results = []
        for model in (one, two):
            rng, seen = random.Random(seed), []
            ids = prompt_ids(rng.randint(1, 3), rng.randint(2, 11), seed)
            with torch.set_grad_enabled(rng.random() < 0.3), model.trace(ids, use_cache=rng.random() < 0.5):
                kept: dict[Any, Tensor] = {}
                for name, i in points(model):
                    if rng.random() > 0.2:
                        continue
                    value = getattr(model, name)[i]
                    seen.append(value.detach().clone())
                    what = rng.randrange(4)
                    if what == 0:
                        setattr_of(model, name, i, changed(value, seed))
                    elif what == 1 and value.is_floating_point():
                        axis = rng.randrange(value.ndim)
                        setattr_of(
                            model,
                            name,
                            i,
                            value - 0.5 * value.roll(1, axis) if "attention_" not in name else value * 0.7,
                        )
                    elif what == 2 and value.shape in kept and value.is_floating_point():
                        setattr_of(model, name, i, (value + kept[value.shape]) / 2)
                    kept[value.shape] = value
                if rng.random() < 0.7:
                    seen.append(model.logits.detach())
            results.append(seen)
        for k, (first, second) in enumerate(zip(*results, strict=True)):
            near(first, second, f"program {seed}, value {k}")


def refused(case: str) -> None:
    """What cannot be had says so, on every rank."""
    _, two = loaded(case)
    with_text(InputError, "are split over 2 ranks", lambda: two.W_Q[0])
    with_text(InputError, "A scan", lambda: two.scan(prompt_ids()).__enter__())
    folder = FOLDER / "llama-one-kv"
    if dist.get_rank() == 0:
        build("llama", **CHANGES["llama-one-kv"]).double().save_pretrained(folder)
    dist.barrier()
    plain = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    with_text(InputError, "The model has 1 and 4 heads", lambda: StandardizedTransformer(plain))
    by_name = StandardizedTransformer(folder, tp_plan="auto")
    one = StandardizedTransformer(folder)
    for model in (by_name, one):
        with torch.no_grad(), model.trace(prompt_ids()):
            keys = model.keys[1]
        assert keys.shape == (2, 1, 9, 8)


def out_of_step(case: str) -> None:
    """Ranks whose blocks differ are told, and can go on with the next."""
    _, two = loaded(case)
    rank, ids = dist.get_rank(), prompt_ids()
    fine = two.hf_model(ids).logits

    def other_layer() -> None:
        with two.trace(ids):
            two.layers_output[rank]

    def one_raises() -> None:
        with two.trace(ids):
            two.layers_output[0]
            if rank == 1:
                raise KeyError("mine")
            two.layers_output[1]

    def one_ends() -> None:
        with two.trace(ids):
            two.layers_output[0]
            if rank == 0:
                two.layers_output[1]

    def other_prompts() -> None:
        with two.trace(ids + rank):
            two.layers_output[0]

    def one_watches() -> None:
        with two.trace(ids) as tracer:
            two.keys[:] if rank else two.layers_output[0]
            tracer.result

    def raises_at_the_end() -> None:
        with two.trace(ids):
            two.logits
            if rank == 1:
                raise KeyError("late")

    for call, texts in {
        other_layer: ("rank 0: asks for layers_output[0]", "rank 1: asks for layers_output[1]"),
        one_raises: ("rank 1: KeyError: 'mine'",),
        one_ends: ("rank 0: asks for layers_output[1]", "rank 1: is at the block's end"),
        other_prompts: ("The prompts",),
        one_watches: ("not at the same place",),
        raises_at_the_end: ("rank 1: KeyError: 'late'",),
    }.items():
        try:
            call()
        except KeyError:
            assert rank == 1, call
            assert "KeyError" in texts[0], call
        except NnatomyError as error:
            assert type(error).__name__ == "RanksError", repr(error)
            assert all(text in str(error) for text in texts), (call, error)
        else:
            raise AssertionError(f"{call}: nothing was noticed")
        with torch.no_grad(), two.trace(ids):  # all are in step again
            assert torch.equal(two.logits, fine), call


def fails_alike(case: str) -> None:
    """An error in the model on all ranks is the model's own, and leaves them in step."""
    _, two = loaded(case)
    ids = prompt_ids()
    for _ in range(2):
        try:
            with two.trace(ids):
                two.layers[1].input_layernorm.output = torch.ones(2, 3)
                two.logits
        except RuntimeError as error:
            assert "RanksError" not in repr(error), error
        else:
            raise AssertionError
    with torch.no_grad(), two.trace(ids):
        heads, logits = two.heads_output[2], two.logits
    assert heads.shape[2] == two.num_heads
    assert torch.equal(logits, two.hf_model(ids).logits)


def with_text(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(f"{text}: nothing was raised")


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = {}
    for check in sys.argv[2:]:
        match = re.fullmatch(r"(\w+)\[([\w-]+)(?:, (\d+))?\]", check)
        assert match is not None, check
        name, case, number = match.groups()
        try:
            globals()[name](case, *([int(number)] if number else []))
            found[check] = ""
        except Exception:
            found[check] = f"rank {os.environ['RANK']}:\n{traceback.format_exc()}"
    (FOLDER / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
