"""`make vllm`: tensor parallelism. What two processes read and write of one model is what one process does with all of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_models import assert_near, folder, on_engine
from vllm_ranks import IDS, NAMES

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError

RANKS = Path(__file__).parents[1] / "vllm_ranks.py"


def on_two(name: str, out: Path) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    root = RANKS.parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}:{root / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [*command, str(RANKS), folder(name), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_processes_are_as_one(name: str, tmp_path: Path) -> None:
    first, second = on_two(name, tmp_path)
    model = on_engine(name)
    assert first["counts"] == second["counts"] == model.validation.counts
    assert "of Transformers" in first["by"]
    for one in NAMES:
        if not getattr(model, one).layers:
            continue
        with model.trace(IDS):
            whole = getattr(model, one)[1]
        assert_near(first[one], whole)
        assert torch.equal(first[one], second[one])
    with model.trace(IDS):
        model.heads_output[1][:, :, 1] = 0
        model.layers_output[1] = 2 * model.layers_output[1]
        assert_near(first["logits"], model.logits)

    def steer() -> None:
        model.layers_output[0] += 0.5

    done = model.edit(steer).generate(IDS, max_new_tokens=4, ignore_eos=True).run()
    assert first["tokens"] == second["tokens"] == [list(one.outputs[0].token_ids) for one in done]
    with model.generate(IDS, max_new_tokens=3, ignore_eos=True) as tracer:
        for _ in tracer.iter[2]:
            assert_near(first["keys so far"], model.keys[2])


def test_processes_that_nobody_has_launched() -> None:
    with pytest.raises(
        InputError,
        match=r"tensor_parallel_size=2: each process runs the script, .*torchrun --nproc-per-node 2 script.py",
    ):
        StandardizedTransformer(folder("llama"), engine="vllm", tensor_parallel_size=2)
    with pytest.raises(
        InputError, match=r"distributed_executor_backend='ray': the model would be in processes of vLLM's own"
    ):
        StandardizedTransformer(
            folder("llama"), engine="vllm", tensor_parallel_size=2, distributed_executor_backend="ray"
        )
