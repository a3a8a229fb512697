"""Traces wherever code can stand: exec, generators, threads, debuggers, coverage, a REPL."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, nothing_left
from torch import Tensor

from nnatomy.tracing import Traceable

X = torch.linspace(-1, 1, 8).reshape(2, 4)
SCRIPT = """
import torch
from torch import nn
from nnatomy.tracing import Traceable

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(2, 2)
    def forward(self, x):
        y = self.one(x)
        return 2 * y

net = Traceable(Twice())
with net.trace(torch.ones(1, 2)) as tracer:
    before = net.one.output
    after = net.output
    same = torch.equal(2 * before, after)
    result = tracer.result
print("same", same, result.shape)
"""


def test_in_exec_functions_loops_and_try() -> None:
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    assert names["same"]
    module = Net()
    net = Traceable(module)

    def inner(factor: float) -> Tensor:
        try:
            with net.trace(factor * X):
                return net.blocks[0].input
        finally:
            pass

    with nothing_left(module):
        assert all(torch.equal(inner(f), f * X) for f in (1.0, 2.0, 3.0))


def test_interleaved_generators_and_one_dropped() -> None:
    module = Net()
    net = Traceable(module)

    def walk(x: Tensor) -> Iterator[Tensor]:
        with net.trace(x):
            for block in net.blocks:
                yield block.input

    with nothing_left(module):
        one, two, three = walk(X), walk(2 * X), walk(3 * X)
        pairs = [(next(one), next(two)) for _ in range(2)]
        next(three)
        del three
        pairs.append((next(one), next(two)))
        one.close()
        two.close()
    with net.trace(X):
        expected_one = [block.input for block in net.blocks]
    with net.trace(2 * X):
        expected_two = [block.input for block in net.blocks]
    for i, (a, b) in enumerate(pairs):
        assert torch.equal(a, expected_one[i])
        assert torch.equal(b, expected_two[i])


def test_a_plain_call_beside_a_trace_is_not_touched() -> None:
    module = Net()
    net = Traceable(module)
    plain = module(X)
    with net.trace(X):
        net.blocks[0].input = 5 * X
        assert torch.equal(module(X), plain)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(module, X).result(), plain)


def test_a_copy_or_pickle_made_inside_a_block_is_a_module_of_its_own() -> None:
    import copy
    import pickle

    module = Net()
    net = Traceable(module)
    with net.trace(X):
        _ = net.blocks[0].output
        clone = copy.deepcopy(module)
        loaded = pickle.loads(pickle.dumps(module))
    with torch.no_grad():
        clone.head.weight.zero_()
        loaded.head.weight.zero_()
        for other in (clone, loaded):
            assert torch.equal(other(X), module.head.bias.expand(2, 2))
    with Traceable(clone).trace(X) as tracer:
        assert torch.equal(tracer.result, clone.head.bias.expand(2, 2))


def run(arguments: list[str], text: str = "", cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_a_repl() -> None:
    lines = "".join(line + "\n" for line in SCRIPT.strip().split("\n"))
    lines = lines.replace("        return 2 * y\n", "        return 2 * y\n\n").replace(
        "tracer.result\n", "tracer.result\n\n"
    )
    lines = lines.replace("    def forward", "    def forward")
    assert "same True torch.Size([1, 2])" in run(["-i", "-q"], lines.replace("\n\nnet", "\n\n\nnet"))


def test_under_coverage_the_lines_of_block_and_model_count(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run(["-m", "coverage", "run", f"--include={script}", str(script)], cwd=tmp_path)
    report = run(["-m", "coverage", "report", "-m"], cwd=tmp_path)
    assert "100%" in report.split("\n")[2], report


def test_under_pdb_the_block_is_stepped_through(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    line = SCRIPT.split("\n").index("    after = net.output") + 1
    out = run(
        ["-m", "pdb", str(script)],
        f"b {line}\nc\nn\np torch.equal(after, 2 * before)\np net.output is after\nc\nq\n",
    )
    assert out.count("\nTrue\n") + out.count("(Pdb) True\n") == 2, out
    assert "same True" in out


def test_the_interpreter_ends_with_a_trace_open() -> None:
    text = SCRIPT + textwrap.dedent("""
        def walk():
            with net.trace(torch.ones(1, 2)):
                yield net.one.output
        generator = walk()
        next(generator)
        print("end")
    """)
    assert "end" in run(["-c", text])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_another_process(method: str) -> None:
    import multiprocessing

    module = Net()
    with Traceable(module).trace(X):
        _ = Traceable  # an idle worker stays here, and is not in the child
    context = multiprocessing.get_context(method)
    with ThreadPoolExecutor(1):
        queue = context.SimpleQueue()
        process = context.Process(target=_child, args=(queue,))
        process.start()
        process.join(60)
    assert process.exitcode == 0
    assert queue.get() == [2, 4]


def _child(queue: Any) -> None:
    net = Traceable(Net())
    with torch.no_grad(), net.trace(X):
        queue.put(list(net.blocks[1].input.shape))
