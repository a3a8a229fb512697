"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from reference import edited
from torch import nn
from transformers import AutoModelForCausalLM

import nnatomy
from nnatomy import StandardizedTransformer
from nnatomy.cli import main
from nnatomy.cli.anatomy import node
from nnatomy.cli.report import plain_numbers
from nnatomy.errors import NotInThisModelError
from nnatomy.names import ROUTERS, TABLE
from nnatomy.standardized.loading import locate

GPT2, LLAMA = "demo:gpt2", "demo:llama"
FRANCE, JAPAN = "The capital of France is", "The capital of Japan is"
PATCH = ["patch", GPT2, FRANCE, JAPAN, "--answer", " Paris", "--wrong", " Tokyo"]
ROOT = Path(__file__).parents[2]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of mamba and attention layers, and no tokenizer."""
    folder = tmp_path_factory.mktemp("jamba")
    zoo.build("jamba").save_pretrained(folder)
    return str(folder)


def test_check_says_of_every_name_where_it_holds(run: Run) -> None:
    code, out, err = run("check", GPT2, "--json")
    found = json.loads(out)
    model = StandardizedTransformer(GPT2)
    assert (code, err, found["ok"], found["class"]) == (0, "", True, "GPT2LMHeadModel")
    assert found["rows"] == model.validation.to_dict()["rows"]
    of_mixers = {row.name for row in TABLE if row.place == "mixer"}
    assert {row["name"] for row in found["rows"] if row["status"] == "refused"} == {*ROUTERS, *of_mixers}


def test_check_gives_the_reason_of_a_refusal_and_is_no_failure(run: Run, hybrid: str) -> None:
    model = StandardizedTransformer(AutoModelForCausalLM.from_pretrained(hybrid))
    code, out, _ = run("check", hybrid, "--json")
    rows = [row for row in json.loads(out)["rows"] if row["name"] == "attentions_output"]
    assert code == 0
    assert [row["layer"] for row in rows if row["status"] == "verified"] == list(model.attention_layers)
    assert all("mamba" in row["detail"] for row in rows if row["status"] == "refused")
    code, out, _ = run("check", hybrid)
    beside = " ".join(out.partition("name ")[0].split())  # the line of the count, wrapped
    assert " refused. Refused: to ask for it is an error that says why" in beside
    assert "its token mixer is mamba" in beside
    with pytest.raises(NotInThisModelError, match="mamba"), model.trace(torch.ones(1, 3, dtype=torch.long)):
        model.attentions_output[0]  # which is what the line says
    assert any(
        line.startswith("attentions_output") and "refused" in line and "mamba" in line for line in out.split("\n")
    )


def test_check_of_a_model_that_fails_lists_what_failed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = import_module("nnatomy.arch_configs.resolve")
    wrong = [
        replace(family, self_attn="ln_1", classes=("GPT2LMHeadModel",))
        for family in resolve.FAMILIES
        if "GPT2LMHeadModel" in family.classes
    ]
    assert wrong
    monkeypatch.setattr(resolve, "FAMILIES", wrong)
    code, out, _ = run("check", GPT2, "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (1, False)
    queries = {"name": "queries", "layer": 5, "status": "failed", "error": None}
    assert {**queries, "detail": "fires 0 times in a forward pass, not once"} in found["rows"]
    code, out, _ = run("check", GPT2)
    assert code == 1
    assert re.search(r"^queries +0-5 +failed +fires 0 times", out, re.MULTILINE)
    assert run("lens", GPT2, FRANCE)[0] == 1


@pytest.mark.parametrize("name", [GPT2, LLAMA])
def test_anatomy_names_the_modules_that_the_names_mean(run: Run, name: str) -> None:
    code, out, _ = run("anatomy", name, "--json")
    found, model = json.loads(out), StandardizedTransformer(name)
    named = {key: model.hf_model.get_submodule(path) for key, path in found["names"].items()}
    assert code == 0
    for i, layer in enumerate(model.layers):
        assert named[f"layers[{i}]"] is not None
        assert found["names"][f"layers[{i}]"] == layer.path
        assert found["names"][f"layers[{i}].self_attn"] == layer.self_attn.path
        assert found["names"][f"layers[{i}].mlp"] == layer.mlp.path
    assert type(named["ln_final"]) is type(model.ln_final.module)
    assert found["names"]["embed_tokens"] == model.embed_tokens.path
    assert (found["hidden_size"], found["num_heads"]) == (model.hidden_size, model.num_heads)


def test_anatomy_folds_layers_that_are_alike(run: Run, hybrid: str) -> None:
    _, out, _ = run("anatomy", LLAMA)
    assert out.count("LlamaDecoderLayer") == 1
    assert "0-7  LlamaDecoderLayer  = layers[i]" in out
    assert "q_proj  Linear  96x96" in out
    _, out, _ = run("anatomy", hybrid)
    assert "mamba  JambaMambaMixer  64x16, 64  = layers[i] mixer (mamba)" in out
    assert all(f"── {i}  Jamba" in out for i in range(4))  # each its own: of mamba or attention, dense or of experts


def test_only_what_is_alike_all_the_way_down_is_folded() -> None:
    def block(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, width), nn.ReLU())

    stack = nn.ModuleList([block(4), nn.ReLU(), block(4), block(5), block(4), nn.ReLU()])
    found = node("", stack, {stack[1]: ["a"], stack[5]: ["b"]})
    assert [one.name for one in found.children] == ["0, 2, 4", "1", "3", "5"]


def test_every_parameter_is_in_the_tree_once_for_each_shape(run: Run) -> None:
    """The folded tree, unfolded again, has the model's parameters."""
    tree = json.loads(run("anatomy", LLAMA, "--json")[1])["tree"]
    hf = AutoModelForCausalLM.from_pretrained(locate(LLAMA))

    def count(node: dict[str, Any]) -> int:
        first, _, last = node["name"].partition("-")
        times = int(last) - int(first) + 1 if last else 1
        own = sum(torch.Size(shape).numel() for shape in node["shapes"].values())
        return times * (own + sum(map(count, node["children"])))

    assert count(tree) == sum(value.numel() for _, value in hf.named_parameters(remove_duplicate=False))


def test_the_last_layer_of_the_lens_is_what_the_model_says(run: Run) -> None:
    code, out, err = run("lens", LLAMA, FRANCE, "--top", "3", "--json")
    found, model = json.loads(out), StandardizedTransformer(LLAMA)
    ids = model.tokenizer(FRANCE, return_tensors="pt").input_ids
    with torch.no_grad():
        top = model.hf_model(ids).logits[0].softmax(-1).topk(3)
    assert (code, err) == (0, "")
    assert found["tokens"] == [model.tokenizer.decode([token]) for token in ids[0]]
    assert len(found["layers"]) == 8
    for place, (values, indices) in zip(found["layers"][-1], zip(*top, strict=True), strict=True):
        assert [one["token"] for one in place] == [model.tokenizer.decode([token]) for token in indices]
        assert [one["probability"] for one in place] == pytest.approx(values.tolist(), rel=1e-4)
    assert found["layers"][-1][-1][0]["token"] == " Paris"


def test_each_layer_of_the_lens_is_what_the_head_makes_of_it(run: Run) -> None:
    found = json.loads(run("lens", GPT2, FRANCE, "--json")[1])
    hf, tokenizer = (
        AutoModelForCausalLM.from_pretrained(locate(GPT2)),
        StandardizedTransformer(GPT2).tokenizer,
    )
    with torch.no_grad():
        hidden = hf(**tokenizer(FRANCE, return_tensors="pt"), output_hidden_states=True).hidden_states
        for i, state in enumerate(hidden[1:-1]):
            probs = hf.lm_head(hf.transformer.ln_f(state[0])).softmax(-1)
            assert [place[0]["probability"] for place in found["layers"][i]] == pytest.approx(
                probs.max(-1).values.tolist(), rel=1e-4
            )


def test_the_lens_table_has_its_columns_below_each_other_where_they_do_not_fit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = run("lens", GPT2, FRANCE)
    assert max(map(len, out.split("\n"))) <= 40
    assert out.count("layer") > 1
    heads = [word for line in out.split("\n") if line.startswith("layer") for word in line.split()[1:]]
    assert heads == ["The", "·capital", "·of", "·France", "·is"]
    assert "·Paris 99%" in out


def test_the_patching_map_is_what_plain_hooks_give(run: Run) -> None:
    code, out, _ = run(*PATCH, "--json")
    found = json.loads(out)
    hf, tokenizer = (
        AutoModelForCausalLM.from_pretrained(locate(GPT2)),
        StandardizedTransformer(GPT2).tokenizer,
    )
    clean, corrupted = (tokenizer(text, return_tensors="pt").input_ids for text in (FRANCE, JAPAN))
    right, wrong = (tokenizer.encode(text, add_special_tokens=False)[0] for text in (" Paris", " Tokyo"))
    with torch.no_grad():
        states = hf(clean, output_hidden_states=True).hidden_states

        def patched(layer: int, position: int) -> float:
            def put(hidden: torch.Tensor) -> torch.Tensor:
                hidden = hidden.clone()
                hidden[:, position] = states[layer + 1][:, position]
                return hidden

            logits = edited(lambda: hf(corrupted), hf.transformer.h[layer], "output", put).logits[0, -1]
            return float(logits[right] - logits[wrong])

        assert code == 0
        for layer, position in ((0, 3), (1, 4), (3, 3), (4, 4)):
            assert found["effect"][layer][position] == pytest.approx(patched(layer, position), rel=1e-3, abs=1e-3)
    assert found["metric"] == "logit(·Paris) - logit(·Tokyo)"
    assert found["normalized"][0][3] > 0.8
    assert found["normalized"][5][4] == pytest.approx(1, abs=1e-3)


def test_the_point_that_is_patched_can_be_chosen(run: Run) -> None:
    found = json.loads(run(*PATCH, "--json", "--point", "mlps_contribution")[1])
    assert found["point"] == "mlps_contribution"
    assert found["effect"] != json.loads(run(*PATCH, "--json")[1])["effect"]
    code, _, err = run(*PATCH, "--point", "nonsense")
    assert code == 2
    assert "nonsense" in err


ATTEND = ["attend", GPT2, FRANCE, "--layer", "-1"]
ATTRIBUTE = ["attribute", GPT2, FRANCE, "--answer", " Paris", "--wrong", " Tokyo"]
STEER = ["steer", LLAMA, FRANCE, "--toward", JAPAN, "--away", FRANCE, "--layer", "4", "--tokens", "2"]


@pytest.mark.parametrize(
    "arguments", [["check", GPT2], ["anatomy", GPT2], ["lens", GPT2, FRANCE], PATCH, ATTEND, ATTRIBUTE, STEER]
)
def test_a_page_is_written_beside_the_table(arguments: list[str], run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    code, out, _ = run(*arguments, "--html", str(file))
    page = file.read_text(encoding="utf-8")
    assert code == 0
    assert out.strip()
    assert page.startswith("<!doctype html>")
    assert "prefers-color-scheme" in page or "light-dark" in page
    assert 'src="' not in page.split("<script")[0]
    assert {"check": "heads_output", "anatomy": "c_attn", "lens": "Paris", "patch": "France", "steer": "Tehran"}.get(
        arguments[0], "capital"
    ) in page


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none/a.html", "there is no folder {folder}/none."),
        (".", "this command writes .html, as the file's name ends."),
        ("folder.html", "that is a folder."),
        ("a.png", "this command writes .html, as the file's name ends."),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    name: str, text: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("nnatomy.cli.anatomy"), "load", None)
    (tmp_path / "folder.html").mkdir()
    code, out, err = run("anatomy", GPT2, "--out", str(tmp_path / name))
    assert (code, out) == (2, "")
    assert err == f"nnatomy: --out {tmp_path / name}: {text.format(folder=tmp_path)}\n"


def test_where_the_file_is_is_said(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.svg"
    code, out, err = run(*PATCH, "--out", str(file))
    assert code == 0
    assert out
    assert err.endswith(f"nnatomy: written to {file}\n")
    assert "<svg" in file.read_text(encoding="utf-8")


def test_patching_by_head(run: Run) -> None:
    model = StandardizedTransformer(GPT2)
    found = json.loads(run(*PATCH, "--heads", "--json")[1])
    assert found["point"] == "heads_output"
    assert found["heads"] == list(range(model.num_heads))
    with torch.no_grad():
        with model.trace(FRANCE):
            clean = model.heads_output[3][:, :, 1]
        with model.trace(JAPAN):
            model.heads_output[3][:, :, 1] = clean
            logits = model.logits[0, -1]
    answer, wrong = (model.tokenizer.encode(text)[0] for text in (" Paris", " Tokyo"))
    assert found["effect"][3][1] == pytest.approx(float(logits[answer] - logits[wrong]), abs=1e-3)
    table = run(*PATCH, "--heads")[1]
    assert "heads_output" in table
    assert "H5" in table


def test_patterns_of_a_layer(run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(locate(GPT2), attn_implementation="eager")
    ids = StandardizedTransformer(GPT2).to_tokens(FRANCE)
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions[-1][0]
    found = json.loads(run(*ATTEND, "--json")[1])
    assert found["layer"] == model.config.n_layer - 1
    assert torch.allclose(torch.tensor(found["patterns"]), expected, atol=1e-4)
    last = next(line for line in run(*ATTEND)[1].splitlines() if line.startswith("L5H0"))
    assert last.endswith(f"{expected[0, -1].max():.0%}")
    assert run("attend", GPT2, FRANCE, "--layer", "9")[0] == 2


def test_parts_of_a_logit(run: Run) -> None:
    found = json.loads(run(*ATTRIBUTE, "--json")[1])
    model = StandardizedTransformer(GPT2)
    with torch.no_grad(), model.trace(FRANCE):
        logits = model.logits[0, -1]
    answer, wrong = (model.tokenizer.encode(text)[0] for text in (" Paris", " Tokyo"))
    assert found["logit"] == pytest.approx(float(logits[answer] - logits[wrong]), abs=1e-3)
    assert sum(found["parts"].values()) == pytest.approx(found["logit"], abs=1e-3)
    table = run(*ATTRIBUTE, "--top", "3")[1].splitlines()
    assert table[0].startswith("logit(·Paris) - logit(·Tokyo) = ")
    assert len(table) == 6


def test_what_a_steered_model_writes(run: Run) -> None:
    found = json.loads(run(*STEER, "--json", "--factor", "0", "2")[1])
    model = StandardizedTransformer(LLAMA)
    with torch.no_grad():
        ends = []
        for prompt in (JAPAN, FRANCE):
            with model.trace(prompt):
                ends.append(model.layers_output[4][0, -1])
        with model.generate(FRANCE, max_new_tokens=2, do_sample=False) as tracer:
            for _ in tracer.iter[:]:
                model.layers_output[4] = model.layers_output[4] + 2 * (ends[0] - ends[1])
            tokens = tracer.result
    assert [one["factor"] for one in found["texts"]] == [0, 2]
    assert found["texts"][0]["text"] == model.generate_text(FRANCE, max_new_tokens=2, do_sample=False)
    assert found["texts"][1]["text"] == model.to_string(tokens[0, -2:])
    assert run(*STEER, "--tokens", "0")[:2] == (2, "")


def test_help_and_version_are_quick() -> None:
    """Neither imports PyTorch."""
    told = "import sys; from nnatomy.cli import main\ntry: main([{!r}])\nfinally: assert 'torch' not in sys.modules"
    for option, shown in (("--help", "usage: nnatomy"), ("--version", f"nnatomy {nnatomy.__version__}")):
        done = subprocess.run([sys.executable, "-c", told.format(option)], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(shown)


def test_stdout_has_the_json_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("nnatomy.cli.lens")
    load = module.load

    def noisy(*arguments: Any, **more: Any) -> Any:
        sys.stdout.write("said by the model's own code\n")
        return load(*arguments, **more)

    monkeypatch.setattr(module, "load", noisy)
    _, out, err = run("lens", GPT2, FRANCE, "--json")
    assert json.loads(out)["prompt"] == FRANCE
    assert err == "said by the model's own code\n"


def test_a_models_own_code_runs_only_if_told_to(run: Run, tmp_path: Path) -> None:
    for file in Path(locate(LLAMA)).iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "print('said while it is imported')\n"
    )
    code, _, err = run("lens", str(tmp_path), FRANCE, "--json")
    assert code == 1
    assert "contains custom code which must be executed" in err
    code, out, err = run("lens", str(tmp_path), FRANCE, "--json", "--trust-remote-code")
    assert code == 0
    assert json.loads(out)["layers"][-1][-1][0]["token"] == " Paris"
    assert "said while it is imported" in err


def test_precision_and_device(run: Run) -> None:
    found = json.loads(run("anatomy", LLAMA, "--dtype", "bfloat16", "--device", "cpu", "--json")[1])
    assert (found["dtype"], found["device"]) == ("bfloat16", "cpu")
    assert json.loads(run("anatomy", LLAMA, "--json")[1])["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (
            ["check", "demo:none"],
            1,
            "nnatomy: There is no demo model 'demo:none': there are demo:gpt2, demo:llama, demo:smollm2.\n",
        ),
        (
            ["lens", GPT2, FRANCE, "--top", "0"],
            2,
            "nnatomy: --top 0: give a number from 1 to 742, the size of the vocabulary.\n",
        ),
        ([*PATCH[:3], "Japan is", *PATCH[4:]], 2, "equal length"),
        ([*PATCH[:-1], " nonsense words"], 2, "nonsense"),
        (["lens", GPT2], 2, "PROMPT"),
        (["lens", GPT2, ""], 2, "nnatomy: "),
        (["check", GPT2, "--device", "nonsense"], 2, "nonsense"),
        (["check", GPT2, "--dtype", "int3"], 2, "int3"),
        (["dissect", GPT2], 2, "dissect"),
        ([], 2, "COMMAND"),
    ],
)
def test_errors_are_told_on_stderr(arguments: list[str], code: int, text: str, run: Run) -> None:
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert text in err
    assert "Traceback" not in err


def test_a_folder_without_a_model_cannot_be_loaded(run: Run, tmp_path: Path) -> None:
    code, _, err = run("check", str(tmp_path))
    assert code == 1
    assert err.startswith(f"nnatomy: The model '{tmp_path}' could not be loaded: ")


def test_a_prompt_needs_a_tokenizer(run: Run, hybrid: str) -> None:
    code, _, err = run("lens", hybrid, FRANCE)
    assert code == 2
    assert err.startswith(f"nnatomy: {hybrid} reads no text: none could be loaded from ")


def test_debug_shows_where_an_error_is_from(run: Run) -> None:
    code, _, err = run("check", "demo:none", "--debug")
    assert code == 1
    assert err.startswith("Traceback")
    assert "LoadError" in err


@pytest.mark.parametrize("arguments", [["check", GPT2], ["lens", GPT2, FRANCE]])
def test_tables_need_rich_and_json_does_not(
    arguments: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    page = str(tmp_path / "a.html")
    code, out, err = run(*arguments, *(["--html", page] if arguments[0] == "check" else []))
    assert (code, out) == (1, "")
    assert err == 'nnatomy: Tables are drawn by rich: pip install "nnatomy[cli]". (--json works without.)\n'
    assert run(*arguments, "--json")[0] == 0


def test_numbers_that_json_does_not_have_are_null() -> None:
    assert plain_numbers(torch.tensor([[1.5, float("nan")], [float("-inf"), 0]])) == [
        [1.5, None],
        [None, 0.0],
    ]


def test_ctrl_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("nnatomy.cli.check"), "load", interrupted)
    assert run("check", GPT2) == (130, "", "")


def test_only_a_terminal_that_wants_colors_gets_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b" not in run("check", GPT2)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32m" in run("check", GPT2)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in run("check", GPT2)[1]  # bold and dim are no colors


def test_an_encoding_without_the_letters_is_no_crash() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "nnatomy", "lens", GPT2, FRANCE]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0
    assert "\\xb7Paris 99%" in run.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "nnatomy", "anatomy", GPT2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait() == 141


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts["nnatomy"].partition(":")
    assert getattr(import_module(module), function) is main


def test_help_names_the_commands(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("check", "anatomy", "lens", "patch", "exit codes"))
