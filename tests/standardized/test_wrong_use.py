"""Wrong input, in Python and on the command line: it says what was found and how to mend it. The table is in `wrong_use.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nnatomy.cli import main
from nnatomy.errors import InputError, LoadError
from nnatomy.standardized import ActivationCache
from nnatomy.standardized.asked_for import check_cuda, check_dtype, check_model


def test_each_is_an_error_that_says_how_to_mend_it() -> None:
    script = Path(__file__).with_name("wrong_use.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^device_map='cuda': PyTorch sees no CUDA device here.* device_map='cpu'\.$"):
        check_cuda("device_map", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="^device='cuda:2': there are 2 CUDA devices, cuda:0 to cuda:1\\.$"):
        check_cuda("device", torch.device("cuda:2"))
    check_cuda("device", "cuda:1")
    check_cuda("device", "cpu")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("fp16", "float16"), ("half_", "float16"), ("bf16", "bfloat16"), ("FP32", "float32"), (16, "float16")],
)
def test_a_precision_by_another_name(given: Any, meant: str) -> None:
    with pytest.raises(InputError, match=f"^dtype={given!r}: give torch.{meant}, or '{meant}', or another dtype"):
        check_dtype("dtype", given)


@pytest.mark.parametrize(
    "dtype", [None, "auto", "float16", "torch.bfloat16", "half", torch.float64, {"": torch.float16}]
)
def test_a_precision_that_there_is(dtype: Any) -> None:
    check_dtype("dtype", dtype)


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not much")
    with pytest.raises(LoadError, match=r"model.safetensors' is a file: give the folder, with its config.json"):
        check_model(file)
    with pytest.raises(LoadError, match="^There is no folder "):
        check_model(tmp_path / "none")
    check_model(tmp_path)
    with pytest.raises(InputError, match=r"model.safetensors was not written by ActivationCache.save: "):
        ActivationCache.load(file)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lens", "demo:gpt2", "Paris", "--device", "cuda:99"], "nnatomy: --device='cuda:99': "),
        (["lens", "./none", "Paris"], "nnatomy: There is no folder './none' (looked for in "),
        (
            ["patch", "demo:gpt2", "a", "b", "--answer", "c", "--wrong", "d", "--point", "heads"],
            "nnatomy: --point heads: it is no standard name of layers; one head at a time is --heads. Names: layers_input, ",
        ),
        (["serve", "demo:gpt2", "--port", "99999"], "nnatomy: --port 99999: ports are 1 to 65535"),
    ],
)
def test_the_command_line_says_it_before_the_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) != 0
    assert capsys.readouterr().err.startswith(said)
