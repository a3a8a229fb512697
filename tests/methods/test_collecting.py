"""Collected activations against plain hooks on each prompt alone."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from architectures import PLACES, prompt_ids, shared
from reference import hooked
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Cache

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError
from nnatomy.methods import ActivationStore, collect_activations
from nnatomy.methods.prompts import Prompt

ZOO = ("falcon_h1", "lfm2", "qwen3_next", "llama4_text", "deepseek_v32")
TYPES = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", *ZOO)
LENGTHS = (5, 1, 9, 3, 9, 2, 7)
PROMPTS = [prompt_ids(1, length, seed=length + i)[0].tolist() for i, length in enumerate(LENGTHS)]
MODEL = StandardizedTransformer(shared("gpt2"))


def close(one: Tensor, other: Tensor) -> None:
    """The same to float32's precision: a padded batch is summed in another order."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def build(model_type: str) -> tuple[nn.Module, list[nn.Module]]:
    if model_type in ZOO:
        hf = zoo.build(model_type)
        return hf, list(hf.model.layers)
    hf = shared(model_type)
    return hf, list(hf.get_submodule(PLACES[model_type][0]))


def alone(hf: nn.Module, layers: list[nn.Module], ids: list[int], kind: str = "output") -> dict[int, Tensor]:
    """By plain hooks: (seq, hidden) of each layer, of one prompt with no padding."""
    points = {i: (layer, kind) for i, layer in enumerate(layers)}
    return {i: value[0] for i, value in hooked(hf, lambda: hf(torch.tensor([ids])), points).items()}


def collect(model: Any, prompts: Any, points: Any = "layers_output", **kwargs: Any) -> Any:
    return collect_activations(model, prompts, points=points, progress=False, **kwargs)


@pytest.mark.parametrize("model_type", TYPES)
def test_each_row_is_what_a_hook_sees_of_that_prompt_alone(model_type: str) -> None:
    hf, layers = build(model_type)
    prompts = [[16 + token % 40 for token in ids] for ids in PROMPTS] if model_type in ZOO else PROMPTS
    points = {"layers_output": None, "layers_input": [-1, 0]}
    acts = collect(StandardizedTransformer(hf), prompts, points, positions="all", batch_size=3)
    last = len(layers) - 1
    assert set(acts.tensors) == {("layers_output", i) for i in range(last + 1)} | {
        ("layers_input", 0),
        ("layers_input", last),
    }
    assert acts.offsets.tolist() == [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    assert acts.token_ids.tolist() == [token for ids in prompts for token in ids]
    for i, ids in enumerate(prompts):
        found, outputs, inputs = acts.of_prompt(i), alone(hf, layers, ids), alone(hf, layers, ids, "input")
        for layer, expected in outputs.items():
            close(found["layers_output", layer], expected)
        for layer in (0, last):
            close(found["layers_input", layer], inputs[layer])


@pytest.mark.parametrize("model_type", TYPES)
def test_names_of_one_layer_come_in_one_pass_in_any_order(model_type: str) -> None:
    """Their sum is known: the stream after a layer."""
    hf, layers = build(model_type)
    model = StandardizedTransformer(hf)
    names = ["layers_output", "mlps_contribution", "layers_input", "mixers_contribution"]
    if model_type == "falcon_h1":
        names = ["mlps_contribution", "layers_mid"]
    calls = []
    handle = layers[0].register_forward_hook(lambda *_: calls.append(1))
    acts = collect(model, prompt_ids(3, 6), names, positions="all", batch_size=2)
    handle.remove()
    assert len(calls) == 2
    terms = {name: acts[name, 1] for name in names}
    ids = prompt_ids(3, 6)
    with torch.no_grad():
        outputs = hooked(hf, lambda: hf(ids), {1: (layers[1], "output")})[1].flatten(0, 1)
    terms.pop("layers_output", None)
    close(sum(terms.values()), outputs)


@pytest.mark.parametrize(
    ("positions", "of"),
    [
        ("last", lambda n: [n - 1]),
        (-1, lambda n: [n - 1]),
        (0, lambda n: [0]),
        ([-1, 0], lambda n: [n - 1, 0]),
        (lambda ids: range(len(ids) // 2, len(ids)), lambda n: list(range(n // 2, n))),
        (lambda ids: torch.tensor([len(ids) - 1]), lambda n: [n - 1]),
    ],
)
def test_positions_are_counted_in_each_prompt(positions: Any, of: Any) -> None:
    layers = list(shared("gpt2").transformer.h)
    acts = collect(MODEL, PROMPTS, {"layers_output": 1}, positions=positions, batch_size=4)
    for i, ids in enumerate(PROMPTS):
        close(acts.of_prompt(i)["layers_output", 1], alone(shared("gpt2"), layers, ids)[1][of(len(ids))])


def shapes_run(prompts: Any, batch_size: int | None) -> list[tuple[int, ...]]:
    """(batch, seq) of each forward pass."""
    shapes: list[tuple[int, ...]] = []
    first = shared("gpt2").transformer.h[0]
    handle = first.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    collect(MODEL, prompts, {"layers_output": [1]}, batch_size=batch_size)
    handle.remove()
    return shapes


def test_similar_lengths_share_a_batch() -> None:
    shapes = shapes_run(PROMPTS, 3)
    # whether padding shows: two shorter ones beside the longest, each of them alone
    assert shapes[:8] == [(3, 9), (1, 1), (1, 2), (3, 9), (1, 3), (1, 5), (2, 9), (1, 7)]
    assert shapes[8:] == [(3, 9), (3, 5), (1, 1)]
    assert shapes_run(PROMPTS, 1) == [(1, length) for length in (9, 9, 7, 5, 3, 2, 1)]


def test_by_default_a_pass_has_1024_tokens_at_most_and_little_padding() -> None:
    shapes = shapes_run([[20] * length for length in [3] * 300 + [9] * 130], None)
    assert shapes == [(2, 9), (1, 3), (113, 9), (17 + 6, 9), (294, 3)]  # 6 are padded by 6, a 7th not


def test_no_later_layer_runs_and_nothing_is_cached() -> None:
    late: list[int] = []
    caches: list[Any] = []
    _, second, third = shared("gpt2").transformer.h
    handles = [
        second.register_forward_pre_hook(
            lambda _, args, kwargs: caches.extend(one for one in (*args, *kwargs.values()) if isinstance(one, Cache)),
            with_kwargs=True,
        ),
        third.register_forward_pre_hook(lambda *_: late.append(1)),
    ]
    collect(MODEL, PROMPTS, {"layers_output": [1], "layers_input": [0]}, batch_size=3)
    assert (late, caches) == ([], [])
    shared("gpt2")(torch.tensor([PROMPTS[0]]))
    for handle in handles:
        handle.remove()
    assert late
    assert caches  # the hooks see what they are to see


@torch.no_grad()
def test_of_an_edited_view_they_are_the_edited_ones() -> None:
    edited = MODEL.edit(lambda: MODEL.steer(0, torch.ones(32), factor=2.0))
    acts = collect(edited, PROMPTS, {"layers_output": [1]}, positions="all", batch_size=3)
    first, second, _ = shared("gpt2").transformer.h
    handle = first.register_forward_hook(lambda _, __, output: output + 2)
    for i, ids in enumerate(PROMPTS):
        close(acts.of_prompt(i)["layers_output", 1], alone(shared("gpt2"), [first, second], ids)[1])
    handle.remove()


def test_where_padding_shows_only_prompts_of_one_length_share_a_batch() -> None:
    hf = zoo.build("lfm2")
    model = StandardizedTransformer(hf, validate=False)
    shapes = []
    hf.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    collect(model, [[20] * length for length in LENGTHS], batch_size=3)
    assert shapes[-6:] == [(2, 9), *((1, length) for length in (7, 5, 3, 2, 1))]


def test_what_comes_after_a_read_is_of_the_layers_own_heads() -> None:
    acts = collect(MODEL, PROMPTS, {"heads_output": [1]}, batch_size=7)
    assert acts["heads_output", 1].shape == (7, 4, 8)
    merged = hooked(
        shared("gpt2"),
        lambda: shared("gpt2")(torch.tensor([PROMPTS[2]])),
        {0: (shared("gpt2").transformer.h[1].attn.c_proj, "input")},
    )[0]
    close(acts["heads_output", 1][2].flatten(), merged[0, -1])


def test_dtype_and_any_kind_of_prompt() -> None:
    model = StandardizedTransformer("demo:llama")
    text = "The capital of France is"
    ids = model.tokenizer(text)["input_ids"]
    pad = [0, 0, *ids]
    rows = [
        text,
        Prompt(text, {}),
        ids,
        torch.tensor(ids),
        {"text": text, "label": 3},
        {"input_ids": pad, "attention_mask": [0, 0] + [1] * len(ids), "label": 3},
    ]
    acts = collect(model, (row for row in rows), {"layers_output": [2]}, dtype=torch.float64)
    assert acts["layers_output", 2].dtype == torch.float64
    one = collect(model, text, {"layers_output": [2]})["layers_output", 2]
    assert len(acts) == len(rows)
    close(acts["layers_output", 2], one.double().expand(len(rows), -1))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        (([],), {}, InputError, "There are no prompts to collect activations of."),
        (([5, 6],), {}, InputError, "prompts[0] is 5: for one prompt's token ids, give a list of it, [ids]."),
        (([[5], []],), {}, InputError, "prompts[1]: The prompt is empty: []."),
        (
            ([[5], [99]],),
            {},
            InputError,
            "prompts[1]: Token id 99 is outside of the model's vocabulary of 67",
        ),
        (([{"label": 1}],), {}, InputError, "prompts[0] has neither input_ids nor text; it has label."),
        (
            ({"input_ids": [5]},),
            {},
            InputError,
            "prompts is a mapping: give a list of prompts; one of them may be",
        ),
        (([[[5], [6]]],), {}, InputError, "prompts[0] is several prompts: give each by itself."),
        (
            ([[5, 6]], "logits"),
            {},
            InputError,
            "'logits' is no name with values by position; there are layers_input",
        ),
        (([[5, 6]], []), {}, InputError, "points=[] names no layer."),
        (
            ([[5, 6]], {"mlps_output": [7]}),
            {},
            LayerIndexError,
            "mlps_output[7]: the model has 3 layers, 0 to 2.",
        ),
        (([[5, 6], [7]],), {"positions": 1}, InputError, "prompts[1] has 1 token: there is no position 1."),
        (
            ([[5, 6]],),
            {"positions": "first"},
            InputError,
            "positions='first': give 'last', 'all', indices, or a",
        ),
        (
            ([[5, 6]],),
            {"positions": lambda ids: []},
            InputError,
            "positions: none of prompts[0] was chosen; leave such prompts out.",
        ),
    ],
)
def test_errors(args: Any, kwargs: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        collect(MODEL, *args, **kwargs)


def test_a_layer_without_such_a_thing_is_refused() -> None:
    with pytest.raises(NotInThisModelError, match=r"attentions_output\[0\]: this layer has none"):
        collect(StandardizedTransformer(zoo.build("lfm2")), [[20, 21]], "attentions_output")


# Into a folder.

POINTS = {"layers_output": [0, 2], "mlps_output": [1]}


def into(folder: Path, model: Any = MODEL, prompts: Any = PROMPTS, points: Any = POINTS, **kwargs: Any) -> Any:
    kwargs = {"positions": "all", "batch_size": 2, "prompts_per_shard": 3, **kwargs}
    return collect(model, prompts, points, folder=folder, **kwargs)


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names
    )


def test_a_store_gives_back_what_was_collected(tmp_path: Path) -> None:
    store = into(tmp_path / "acts")
    memory = collect(MODEL, PROMPTS, POINTS, positions="all", batch_size=2)
    loaded = store.load()
    assert len(store) == len(loaded) == len(PROMPTS)
    assert [len(part) for part in store.shards()] == [3, 3, 1]
    assert torch.equal(loaded.offsets, memory.offsets)
    assert torch.equal(loaded.token_ids, memory.token_ids)
    assert set(loaded.tensors) == set(memory.tensors)
    for key, tensor in memory.tensors.items():
        close(loaded[key], tensor)
    for i in (*range(len(PROMPTS)), -1):
        item = store[i]
        assert set(item) == set(memory.tensors)
        for key, tensor in memory.of_prompt(i).items():
            close(item[key], tensor)
    with pytest.raises(IndexError):
        store[len(PROMPTS)]
    assert sorted(path.name for path in store.folder.iterdir()) == [
        *(f"00000{i}.safetensors" for i in range(3)),
        "index.json",
    ]


def test_a_store_is_drawn_as_what_is_in_memory_is(tmp_path: Path) -> None:
    store = into(tmp_path)
    names = [("layers_output", 0), ("layers_output", 2)]
    norms = [store.load()[key].norm(dim=-1) for key in names]
    median, largest, *_ = store.plot().data
    assert median.x == largest.x == (0.0, 1.0, 2.0)
    assert median.name == "layers_output: median"
    assert [median.y[0], median.y[2]] == pytest.approx([float(one.median()) for one in norms])
    assert [largest.y[0], largest.y[2]] == pytest.approx([float(one.max()) for one in norms])
    assert [curve.y for curve in store.load().plot().data[:2]] == [median.y, largest.y]


def test_a_store_feeds_a_data_loader(tmp_path: Path) -> None:
    memory = collect(MODEL, PROMPTS, POINTS, batch_size=2)["layers_output", 2]
    into(tmp_path, positions="last", dtype=torch.bfloat16)
    store = ActivationStore(tmp_path, "layers_output", 2)
    assert store[3].shape == (32,)
    (batch,) = DataLoader(store, batch_size=10)
    assert torch.allclose(batch.float(), memory, rtol=0.01, atol=0.01)
    assert batch.dtype == torch.bfloat16
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: layers_output[1] was not collected; there are")):
        ActivationStore(tmp_path, "layers_output", 1)


class Stopped(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_stopped_at_any_step_of_the_writing_it_goes_on_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    into(tmp_path / "whole")
    original, calls = getattr(os, function), []

    def counted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise Stopped
        return original(*args)

    monkeypatch.setattr(os, function, counted)
    for stop in range(1, 100):
        calls.clear()
        folder = tmp_path / f"stopped-{stop}"
        try:
            into(folder)
            break
        except Stopped:
            pass
        calls[:] = [1] * 100  # stops no more
        into(folder)
        assert same_files(folder, tmp_path / "whole"), stop
    assert stop == {"replace": 8, "fsync": 15}[function]  # three shards, each with its index, and the end


def test_killed_at_random_moments_it_goes_on_to_the_same_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_collecting.py"), tmp_path / "acts"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    killed, *left = [int(number) for number in done.stdout.split()]
    assert killed >= 5
    assert len({number for number in left if 0 < number < 20}) >= 3, "none was killed half-way"
    assert same_files(tmp_path / "acts", tmp_path / "acts-whole")


def test_what_is_done_is_not_computed_again(tmp_path: Path) -> None:
    into(tmp_path)
    calls: list[int] = []
    handle = shared("gpt2").transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    into(tmp_path)
    handle.remove()
    assert calls == []


def test_a_full_disk_leaves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, folder = os.fsync, tmp_path / "acts"

    def full(file: int) -> None:
        if (folder / "000001.safetensors.part").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    monkeypatch.setattr(os, "fsync", full)
    text = (
        "No space left on device, writing 000001.safetensors. The activations of the first 3 prompts are in "
        f"{folder}; the same call goes on from there"
    )
    with pytest.raises(OSError, match=re.escape(text)) as raised:
        into(folder)
    assert raised.value.errno == errno.ENOSPC
    assert sorted(path.name for path in folder.iterdir()) == ["000000.safetensors", "index.json"]
    text = (
        f"{folder}: the collecting was stopped after 3 prompts. Call collect_activations again as it was called to "
        "go on, or give incomplete=True for what is there."
    )
    with pytest.raises(InputError, match=re.escape(text)):
        ActivationStore(folder)
    assert len(ActivationStore(folder, incomplete=True).load()) == 3
    monkeypatch.undo()
    into(folder)
    into(tmp_path / "whole")
    assert same_files(folder, tmp_path / "whole")


def changed(name: str) -> StandardizedTransformer:
    model = StandardizedTransformer(MODEL.hf_model)
    if name == "edits":
        return model.edit(lambda: None)
    hf = type(MODEL.hf_model)(MODEL.hf_model.config).eval()
    hf.load_state_dict(MODEL.hf_model.state_dict())
    with torch.no_grad():
        hf.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    return StandardizedTransformer(hf)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"model": StandardizedTransformer(shared("llama"))},
            "with other model: GPT2LMHeadModel there, LlamaForCausalLM now",
        ),
        ({"model": changed("weights")}, "with other weights: "),
        ({"model": changed("edits")}, "with other edits: 0 there, 1 now"),
        (
            {"points": {"layers_output": [0]}},
            "with other points: {'layers_output': [0, 2], 'mlps_output': [1]} there, {'layers_output': [0]} now",
        ),
        ({"dtype": torch.float16}, "with other dtype: None there, torch.float16 now"),
        ({"prompts_per_shard": 4}, "with other prompts per shard: 3 there, 4 now"),
        ({"positions": "last"}, "of other prompts or positions (in shard 0)"),
        ({"prompts": [*PROMPTS[:-1], [5]]}, "of other prompts or positions (in shard 2)"),
        ({"prompts": PROMPTS[:3]}, "of more prompts"),
        ({"prompts": PROMPTS + PROMPTS}, "of other prompts or positions (in shard 2)"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    into(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    text = f"{tmp_path} has activations {text}"
    with pytest.raises(InputError, match=re.escape(text)) as raised:
        into(tmp_path, **changes)
    assert str(raised.value).endswith(" Give another folder, or delete this one.")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_more_prompts_behind_a_full_shard_are_refused(tmp_path: Path) -> None:
    into(tmp_path, prompts=PROMPTS[:6])
    with pytest.raises(InputError, match="has activations of fewer prompts"):
        into(tmp_path)


def test_no_prompts_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape("There are no prompts to collect activations of.")):
        into(tmp_path / "acts", prompts=iter([]))
    assert not (tmp_path / "acts").exists()
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: there are no activations here (no index.json).")):
        ActivationStore(tmp_path)


def test_the_index_says_what_is_there(tmp_path: Path) -> None:
    into(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["complete"] is True
    assert index["settings"]["points"] == POINTS
    assert [shard["prompts"] for shard in index["shards"]] == [3, 3, 1]


def test_the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods" / "collecting.md"
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)), names)
    assert len(names["everything"]) == 3
    assert names["acts"].of_prompt(1)["layers_output", 0].shape == (3, 96)


def test_the_plot_has_the_norms_of_the_rows() -> None:
    acts = collect_activations(MODEL, PROMPTS, points={"layers_output": [0, 2], "heads_output": [1]}, progress=False)
    curves = {one.name: list(one.y) for one in acts.plot().data}
    norms = [sorted(float(row.norm()) for row in acts["layers_output", layer]) for layer in (0, 2)]
    middle = (len(PROMPTS) - 1) // 2
    for name, expected in (("median", middle), ("largest", -1)):
        first, missing, last = curves[f"layers_output: {name}"]
        assert [first, last] == pytest.approx([one[expected] for one in norms])
        assert missing != missing  # NaN: that layer was not collected
    heads = max(float(row.flatten().norm()) for row in acts["heads_output", 1])
    assert curves["heads_output: largest"][1] == pytest.approx(heads)


def test_a_key_that_is_not_there_says_what_is() -> None:
    acts = collect_activations(MODEL, PROMPTS, points={"layers_output": [0, 2], "mlps_output": 1}, progress=False)
    text = r"\('layers_output', -1\): ask for \(name, layer\), .* there are {'layers_output': \[0, 2\], 'mlps_output': \[1\]}"
    with pytest.raises(KeyError, match=text):
        acts["layers_output", -1]


def test_neurons_are_what_the_down_projection_reads() -> None:
    acts = collect_activations(MODEL, PROMPTS, points={"neurons": [1]}, progress=False)
    hf = MODEL.hf_model
    down = hf.transformer.h[1].mlp.c_proj
    for row, ids in zip(acts["neurons", 1], PROMPTS, strict=True):
        close(row, hooked(hf, lambda ids=ids: hf(torch.tensor([ids])), {"read": (down, "input")})["read"][0, -1])
