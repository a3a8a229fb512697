"""Traces wherever users run them: many threads, pools, coroutines, other processes, a Jupyter kernel."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNGATED, Net, hooks, net, no_leaks, outputs, settles, x
from torch import Tensor, nn

from nnatomy.core import gates, worker
from nnatomy.errors import OutsideTraceError
from nnatomy.tracing import Traceable

HERE = Path(__file__).parent

# Each kind of edit: with nnatomy, and the same with plain hooks. `k` makes every trace's edit its own.


def value(k: int) -> Tensor:
    return x() * (1 + k / 10)


def vector(k: int) -> Tensor:
    return torch.linspace(-1, 1, 4) * (k + 1)


def steered(view: Any, k: int) -> list[Tensor]:
    with view.trace(value(k)) as tracer:
        hidden, scale = view.layers[1].output
        view.layers[1].output = (hidden + vector(k), scale)
        return [hidden, tracer.result]


def steered_by_hooks(model: Net, k: int) -> list[Tensor]:
    seen = []

    def steer(out: Any) -> Any:
        seen.append(out[0])
        return out[0] + vector(k), out[1]

    with hooks((model.layers[1], "output", steer)):
        result = model(value(k))
    return [*seen, result]


def assigned(view: Any, k: int) -> list[Tensor]:
    with view.trace(value(k)) as tracer:
        view.layers[0].mlp[1].input = vector(k).repeat(2, 2)
        after = view.layers[2].mlp.input
        view.head.output = view.head.output * k
        return [after, tracer.result]


def assigned_by_hooks(model: Net, k: int) -> list[Tensor]:
    seen = []
    with hooks(
        (model.layers[0].mlp[1], "input", lambda inputs: ((vector(k).repeat(2, 2),), {})),
        (model.layers[2].mlp, "input", lambda inputs: seen.append(inputs[0][0])),
        (model.head, "output", lambda out: out * k),
    ):
        result = model(value(k))
    return [*seen, result]


def lasting(view: Any, k: int) -> list[Tensor]:
    def edit() -> None:
        view.layers[1].attn.output = view.layers[1].attn.output + vector(k)

    edited = view.edit(edit)
    with edited.trace(value(k)) as tracer:
        hidden = edited.layers[2].output[0]
        result = tracer.result
    return [hidden, result, edited(value(k))]


def lasting_by_hooks(model: Net, k: int) -> list[Tensor]:
    seen = []
    with hooks(
        (model.layers[1].attn, "output", lambda out: out + vector(k)),
        (model.layers[2], "output", lambda out: seen.append(out[0])),
    ):
        result = model(value(k))
    return [*seen, result, result]


def in_blocks(view: Any, k: int) -> list[Tensor]:
    with view.trace() as tracer:
        with tracer.invoke(value(k)[:1]):
            view.embed.output = given * 2  # noqa: F821
            first = tracer.result
        with tracer.invoke(value(k)[1:]):
            given = view.embed.output
            view.layers[2].attn.output = vector(k)[None]
            second = tracer.result
    return [given, torch.cat([first, second])]


def in_blocks_by_hooks(model: Net, k: int) -> list[Tensor]:
    seen = []

    def embed(out: Tensor) -> Tensor:
        seen.append(out[1:].clone())
        return torch.cat([out[1:] * 2, out[1:]])

    def attn(out: Tensor) -> Tensor:
        return torch.cat([out[:1], vector(k)[None]])

    with hooks((model.embed, "output", embed), (model.layers[2].attn, "output", attn)):
        result = model(value(k))
    return [*seen, result]


def generation(model: Net, start: Tensor) -> Tensor:
    steps = [start]
    for _ in range(3):
        steps.append(model(steps[-1])[:, :2].detach())
    return torch.stack(steps)


def in_steps(view: Any, k: int) -> list[Tensor]:
    seen = []
    with view.trace_call(generation, view.module, value(k)) as tracer:
        for step in tracer.iter[:]:
            seen.append(view.embed.output)
            view.head.output = view.head.output + k * step
        return [*seen, tracer.result]


def in_steps_by_hooks(model: Net, k: int) -> list[Tensor]:
    seen: list[Tensor] = []
    with hooks(
        (model.embed, "output", lambda out: seen.append(out)),
        (model.head, "output", lambda out: out + k * (len(seen) - 1)),
    ):
        result = generation(model, value(k))
    return [*seen, result]


KINDS: list[tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]] = [
    (steered, steered_by_hooks),
    (assigned, assigned_by_hooks),
    (lasting, lasting_by_hooks),
    (in_blocks, in_blocks_by_hooks),
    (in_steps, in_steps_by_hooks),
]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def expected_answers(model: Net, count: int) -> list[list[Tensor]]:
    """The k-th is of kind k modulo their number; all of them differ."""
    answers = [KINDS[k % len(KINDS)][1](model, k) for k in range(count)]
    results = [answer[-1] for answer in answers]
    assert all(not torch.equal(one, other) for i, one in enumerate(results) for other in results[:i] if i < 40)
    return answers


def trace(view: Any, k: int) -> list[Tensor]:
    return KINDS[k % len(KINDS)][0](view, k)


def test_ten_threads_on_one_model_each_with_edits_of_its_own() -> None:
    model = net()
    view = Traceable(model)
    expected = expected_answers(model, 200)
    start, wrong, errors = threading.Barrier(10), [], []

    def work(thread: int) -> None:
        start.wait()
        try:
            for k in range(thread, 200, 10):
                # Ten is a multiple of the number of kinds: so that a thread does not do one kind alone.
                k = 10 * (k // 10) + (k + k // 10) % 10
                if not equal(trace(view, k), expected[k]):
                    wrong.append(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    with no_leaks(model):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert not wrong
        assert not view._blocks._by_thread


def test_the_comparison_tells_one_threads_answer_from_anothers() -> None:
    model = net()
    expected = expected_answers(model, 10)
    got = [trace(Traceable(model), k) for k in range(10)]
    assert all(equal(got[k], expected[other]) == (k == other) for k in range(10) for other in range(10))


def test_in_a_pool_some_of_them_failing() -> None:
    model = net()
    view = Traceable(model)
    expected = expected_answers(model, 60)

    def work(k: int) -> bool:
        with pytest.raises(ZeroDivisionError), view.trace(value(k)):
            view.layers[k % 3].output
            1 / 0
        return equal(trace(view, k), expected[k])

    with no_leaks(model), ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(60)))


def test_in_coroutines_and_their_threads() -> None:
    """`asyncio.to_thread`, traces between awaits, and traces that stay open over awaits."""
    model = net()
    view = Traceable(model)
    expected = expected_answers(model, 30)

    async def between(k: int) -> list[Tensor]:
        await asyncio.sleep(0)
        answer = trace(view, k)
        await asyncio.sleep(0)
        return answer

    async def child(k: int) -> Tensor:
        await asyncio.sleep(0)
        return view.layers[1].output[0]

    async def over(k: int) -> list[Tensor]:
        with view.trace(value(k)) as tracer:
            _, scale = view.layers[0].output
            await asyncio.sleep(0)
            hidden = await child(k)
            view.layers[1].output = (hidden + vector(k), scale)
            await asyncio.sleep(0)
            return [hidden, tracer.result]

    async def main() -> list[list[Tensor]]:
        return await asyncio.gather(
            *(asyncio.to_thread(trace, view, k) for k in range(10)),
            *(between(k) for k in range(10, 20)),
            *(over(k) for k in range(0, 30, 5)),
        )

    with no_leaks(model):
        answers = asyncio.run(main())
    assert all(map(equal, answers, expected[:20] + expected[::5]))


def test_a_coroutine_that_is_cancelled_over_an_open_trace() -> None:
    model = net()
    view = Traceable(model)

    async def over() -> None:
        with view.trace(x()):
            view.layers[0].output
            await asyncio.sleep(100)

    async def main() -> list[Tensor]:
        task = asyncio.create_task(over())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return trace(view, 0)

    with no_leaks(model):
        assert equal(asyncio.run(main()), steered_by_hooks(model, 0))


def script(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n" + textwrap.dedent(text))
    return path


def test_under_pytest_xdist(tmp_path: Path) -> None:
    tests = script(
        tmp_path,
        "test_traces.py",
        """
        import pytest
        from helpers import net, no_leaks
        from test_concurrency import KINDS, equal, trace
        from nnatomy.tracing import Traceable

        @pytest.mark.parametrize("k", range(10))
        def test_trace(k, worker_id):
            assert worker_id in ("gw0", "gw1")
            model = net()
            with no_leaks(model):
                assert equal(trace(Traceable(model), k), KINDS[k % len(KINDS)][1](model, k))
        """,
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
            str(tests),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout


# Other processes.

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_child(job: Callable[[], Any]) -> str:
    """What `job` returned in a forked process, or what it raised."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that hangs is ended, and its exit code says so
        try:
            text = str(job())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitpid(process, 0)[1] == 0
    return text


def gated() -> bool:
    return nn.Module._call_impl is not UNGATED


@forks
def test_a_fork_after_traces() -> None:
    """Idle threads stay in the parent."""
    model = net()
    view = Traceable(model)
    expected = expected_answers(model, 10)
    assert all(equal(trace(view, k), expected[k]) for k in range(10))
    assert worker._idle

    def job() -> bool:
        with no_leaks(model), ThreadPoolExecutor(3) as pool:
            right = [equal(trace(view, k), expected[k]) for k in range(10)]
            return all([*right, *pool.map(lambda k: equal(trace(view, k), expected[k]), range(10))])

    assert in_child(job) == "True"
    assert all(equal(trace(view, k), expected[k]) for k in range(10))


def _traces_right(queue: Any) -> None:
    model = net()
    queue.put([equal(trace(Traceable(model), k), KINDS[k % 5][1](model, k)) for k in range(10)])


@forks
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_from_inside_a_trace(method: str) -> None:
    model = net()
    view = Traceable(model)
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    with no_leaks(model), view.trace(value(0)) as tracer:
        hidden, scale = view.layers[1].output
        process = context.Process(target=_traces_right, args=(queue,))
        process.start()
        process.join(100)
        assert process.exitcode == 0
        assert queue.get() == [True] * 10
        view.layers[1].output = (hidden + vector(0), scale)
        assert equal([hidden, tracer.result], steered_by_hooks(model, 0))


@forks
def test_a_fork_inside_a_trace() -> None:
    """The parent's trace goes on. The child has a model without gates, and traces anew; of the open one it may keep
    what it has read, and asking for more, or for its end, is an error."""
    model = net()
    view = Traceable(model)
    expected = expected_answers(model, 10)
    plain = model(x())
    lost = "OutsideTraceError: This trace was open when the process was forked"

    def anew() -> bool:
        right = [equal(trace(view, k), expected[k]) for k in range(10)]
        return all(right) and torch.equal(model(x()), plain) and not gated() and not gates.runs

    with no_leaks(model), view.trace(value(0)) as tracer:
        hidden, scale = view.layers[1].output
        assert in_child(lambda: hidden.shape) == "torch.Size([2, 4])"
        assert in_child(anew) == "True"
        assert in_child(lambda: view.layers[1].output).startswith(lost)
        assert in_child(lambda: view.layers[2].output).startswith(lost)
        assert in_child(lambda: tracer.result).startswith(lost)
        assert in_child(lambda: list(tracer.iter[1:])).startswith(lost)
        assert in_child(tracer.stop) == "None"
        view.layers[1].output = (hidden + vector(0), scale)
        assert equal([hidden, tracer.result], expected[0])


@forks
@pytest.mark.parametrize("kind", ["one block", "several blocks", "edited", "not begun"])
def test_a_child_that_leaves_the_parents_trace(kind: str) -> None:
    model = net()
    view = Traceable(model)
    if kind == "edited":
        view = view.edit(lambda: view.embed.output)
    expected = steered_by_hooks(model, 0)

    def leave(leaving: list[Any]) -> None:
        with view.trace() if kind == "several blocks" else view.trace(x()) as tracer:
            if kind == "several blocks":
                tracer.invoke(x(), lambda: view.head.output)
            if kind != "not begun":
                view.layers[0].output
            leaving.append(os.fork())
            if leaving[0] == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)
            if kind == "not begun":
                leaving.append(view.embed.output)

    read, write = os.pipe()
    leaving: list[Any] = []
    error: BaseException | None = None
    try:
        leave(leaving)
    except OutsideTraceError as caught:
        error = caught
    finally:
        if leaving[0] == 0:
            text = f"{type(error).__name__} {equal(steered(view.without_edits(), 0), expected)}"
            os.write(write, text.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitpid(leaving[0], 0)[1] == 0
    assert error is None
    # Blocks that wait for the forward pass cannot come to their ends.
    assert text == ("OutsideTraceError True" if kind == "several blocks" else "NoneType True")


def no_blas(self: nn.Linear, input: Tensor) -> Tensor:
    """A linear layer by elementwise operations."""
    return (input.unsqueeze(-2) * self.weight).sum(-1) + self.bias


@forks
def test_forks_while_other_threads_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own locks, which a child finds as they are at the fork, are not taken here: BLAS has some, and so has
    each weight that has ever required a gradient (`AutogradMeta` in its C++)."""
    monkeypatch.setattr(nn.Linear, "forward", no_blas)
    model = net()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
    view = Traceable(model)
    expected = expected_answers(model, 10)
    over = threading.Event()
    wrong = []

    def work(k: int) -> None:
        while not over.is_set():
            if not equal(trace(view, k), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(5)]
    with no_leaks(model):
        for thread in threads:
            thread.start()
        try:
            for k in range(10):
                assert in_child(lambda k=k: equal(trace(view, k), expected[k])) == "True"
                assert in_child(gated) == "False"
        finally:
            over.set()
            for thread in threads:
                thread.join()
    assert not wrong


def test_a_fork_after_computing_with_helper_threads(tmp_path: Path) -> None:
    """OpenMP's helpers are not in the child: neither to compute with, nor to be given up (see `worker`)."""
    path = script(
        tmp_path,
        "forks.py",
        """
        import os, signal, torch
        from nnatomy.tracing import Traceable
        torch.set_num_threads(2)
        model = torch.nn.Sequential(*(torch.nn.Linear(768, 768) for _ in range(8)))
        view, x = Traceable(model), torch.randn(768, 768)
        with torch.no_grad():
            expected = model(x)
            process = os.fork()
            if process == 0:
                signal.alarm(60)
                with view.trace(x) as tracer:
                    view[3].output
                    traced = tracer.result
                plain = model(x)
                os._exit(not (torch.allclose(traced, expected, atol=1e-5) and torch.allclose(plain, expected, atol=1e-5)))
            print("child", os.waitpid(process, 0)[1], torch.allclose(model(x), expected, atol=1e-5))
        """,
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "child 0 True\n", done.stdout + done.stderr


# A Jupyter kernel.


class Kernel:
    """A kernel in a process of its own, with its own warnings."""

    def __init__(self, folder: Path) -> None:
        from jupyter_client.blocking import BlockingKernelClient

        self.connection = folder / "connection.json"
        env = {**os.environ, "IPYTHONDIR": str(folder), "JUPYTER_PLATFORM_DIRS": "1"}
        env.pop("PYTHONWARNINGS", None)
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ipykernel_launcher", "-f", str(self.connection)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=env,
                start_new_session=True,
            )
        assert settles(lambda: self.connection.exists() and self.connection.stat().st_size > 0, 100)
        self.client = BlockingKernelClient(connection_file=str(self.connection))
        self.client.load_connection_file()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=100)

    def run(self, cell: str, at: Callable[[str], None] = lambda text: None) -> tuple[str, str]:
        """Execute a cell: what it prints and shows, and its error with traceback, without colours.

        Args:
            at: called with all that has been printed until then, whenever something is.
        """
        shown, error = [], ""

        def output(message: dict[str, Any]) -> None:
            nonlocal error
            content = message["content"]
            if message["msg_type"] == "stream":
                shown.append(content["text"])
                at("".join(shown))
            elif message["msg_type"] == "execute_result":
                shown.append(content["data"]["text/plain"])
            elif message["msg_type"] == "error":
                error = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))

        self.client.execute_interactive(
            textwrap.dedent(cell).strip(), store_history=True, output_hook=output, timeout=100
        )
        return "".join(shown).strip(), error

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.client.stop_channels()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # jupyter_client's own
        kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    try:
        _, error = kernel.run(  # it may show tqdm's warning
            f"""
            import sys, time
            sys.path.insert(0, {str(HERE)!r})
            import torch
            from helpers import Calls, hooks, net, no_leaks, x
            from nnatomy.core import gates
            from nnatomy.tracing import Traceable
            model = net()
            view = Traceable(model)
            with hooks((model.layers[1], "output", lambda out: (0 * out[0], out[1]))):
                expected = model(x())
            """
        )
        assert not error
        yield kernel
    finally:
        kernel.close()


def test_a_notebook_cell_with_a_trace_and_a_last_expression(kernel: Kernel) -> None:
    assert kernel.run(
        """
        with no_leaks(model), view.trace(x()) as tracer:
            hidden, scale = view.layers[1].output
            view.layers[1].output = (0 * hidden, scale)
            result = tracer.result
        torch.equal(result, expected), hidden.shape
        """
    ) == ("(True, torch.Size([2, 4]))", "")
    assert kernel.run("torch.equal(result, expected)") == ("True", "")
    assert kernel.run("with view.trace(x()):\n    print(view.embed.output.shape)") == (
        "torch.Size([2, 4])",
        "",
    )


def test_a_notebooks_blocks_come_from_its_cells(kernel: Kernel) -> None:
    cell = """
        # above the block, so that lines count
        with view.trace() as tracer:
            with tracer.invoke(x()[:1]):
                view.embed.output = given * {factor}
                first = tracer.result
            with tracer.invoke(x()[1:]):
                given = view.embed.output
        with hooks((model.embed, "output", lambda out: given * {factor})):
            alone = model(x()[1:])
        torch.allclose(first, alone, atol=1e-6), given.shape
        """
    for factor in (2, 3, 2):  # the third is the same cell once more
        assert kernel.run(cell.format(factor=factor)) == ("(True, torch.Size([1, 4]))", "")
    assert kernel.run("%%capture said\n" + textwrap.dedent(cell.format(factor=4)).strip() + "\n") == ("", "")
    assert kernel.run("torch.allclose(first, alone, atol=1e-6)") == ("True", "")


def test_a_trace_over_several_cells(kernel: Kernel) -> None:
    assert kernel.run("tracer = view.trace(x()).__enter__()\nhidden, scale = view.layers[1].output") == (
        "",
        "",
    )
    assert kernel.run("view.layers[1].output = (0 * hidden, scale)\nview.layers[2].input.sum().item()") == (
        "0.0",
        "",
    )
    assert kernel.run("torch.equal(tracer.result, expected)") == ("True", "")
    shown, error = kernel.run("view.embed.output")
    assert "OutOfOrderError: embed.output was asked for at" in error
    assert kernel.run("tracer.__exit__(None, None, None)\nlen(gates.runs)") == ("0", "")
    assert "OutsideTraceError" in kernel.run("view.embed.output")[1]


def test_an_edit_in_a_notebook(kernel: Kernel) -> None:
    assert kernel.run(
        """
        factor = 0
        with view.edit() as edited:
            hidden, scale = view.layers[1].output
            view.layers[1].output = (factor * hidden, scale)
        factor = 5
        """
    ) == ("", "")
    assert kernel.run("torch.equal(edited(x()), expected), torch.equal(view(x()), expected)") == (
        "(True, False)",
        "",
    )


def test_an_error_in_a_notebook_names_the_cells_line(kernel: Kernel) -> None:
    _, error = kernel.run("with view.trace(x()):\n    view.embed.output\n    1 / 0  # here")
    assert re.search(r"-+> 3     1 / 0  # here", error), error
    assert "ZeroDivisionError" in error
    _, error = kernel.run(
        """
        with view.trace() as tracer:
            with tracer.invoke(x()):
                a = view.embed.output
                b = a / 0 + []  # there
        """
    )
    assert re.search(r"-+> 4 +b = a / 0 \+ \[\]  # there", error), error
    _, error = kernel.run(
        "with view.trace(x()):\n    late = view.layers[2].output\n    early = view.layers[0].output  # late"
    )
    assert re.search(r"-+> 3     early = view.layers\[0\].output  # late", error), error
    places = re.findall(r"asked for at cell \[(\d+)\], line (\d+)", error)
    assert [line for _, line in places[:2]] == ["3", "2"], error
    assert len({cell for cell, _ in places}) == 1
    assert kernel.run("len(gates.runs)") == ("0", "")


def test_interrupting_a_notebook_in_a_long_forward_pass(kernel: Kernel) -> None:
    kernel.run(
        """
        def forever(self, v):
            v = self.child(v)
            print("at work", flush=True)
            end = time.monotonic() + 100
            while time.monotonic() < end:
                time.sleep(0.01)
            return v
        slow = Calls(forever, child=torch.nn.Tanh())
        slow_view = Traceable(slow)
        """
    )
    cells = [
        "with slow_view.trace(x()) as tracer:\n    tracer.result",
        "with slow_view.trace() as tracer:\n    with tracer.invoke(x()):\n        tracer.result",
        "slow_view.edit(lambda: slow_view.child.output)(x())",
    ]
    for cell in cells:
        sent = []

        def send(text: str, sent: list[str] = sent) -> None:
            if "at work" in text and not sent:
                sent.append(text)
                kernel.interrupt()

        shown, error = kernel.run(cell, send)
        assert sent, (shown, error)
        assert "KeyboardInterrupt" in error, (cell, shown, error)
        assert kernel.run(
            """
            with no_leaks(slow, model), view.trace(x()) as tracer:
                hidden, scale = view.layers[1].output
                view.layers[1].output = (0 * hidden, scale)
                result = tracer.result
            torch.equal(result, expected), len(gates.runs)
            """
        ) == ("(True, 0)", "")


def test_traces_in_awaiting_cells_of_a_notebook(kernel: Kernel) -> None:
    assert kernel.run(
        """
        import asyncio
        async def one(factor):
            with view.trace(factor * x()):
                await asyncio.sleep(0)
                return view.layers[0].input
        got = await asyncio.gather(*(one(k) for k in range(4)), asyncio.to_thread(lambda: view(x())))
        with view.trace(x()) as tracer:
            await asyncio.sleep(0)
            hidden, scale = view.layers[1].output
            view.layers[1].output = (0 * hidden, scale)
            await asyncio.sleep(0)
            result = tracer.result
        torch.equal(result, expected), [torch.equal(g, torch.tanh(model.embed(k * x()))) for k, g in enumerate(got[:4])]
        """
    ) == ("(True, [True, True, True, True])", "")


def test_tasks_that_tasks_with_a_trace_have_made() -> None:
    root = net()
    view, inputs = Traceable(root), [torch.randn(1, 2) for _ in range(3)]

    async def read(view: Any) -> Tensor:
        await asyncio.sleep(0)
        return view.output

    async def block(x: Tensor) -> tuple[Tensor, ...]:
        with view.trace(x):
            await asyncio.sleep(0.01)
            (first,) = await asyncio.gather(read(view.embed))
            with view.trace(2 * x):
                (inner,) = await asyncio.gather(read(view.embed))
            await asyncio.sleep(0.01)
            (second,) = await asyncio.gather(read(view.layers[0].attn))
        return first, inner, second

    async def run() -> list[tuple[Tensor, ...]]:
        return await asyncio.gather(*map(block, inputs))

    with no_leaks(root):
        for x, (first, inner, second) in zip(inputs, asyncio.run(run()), strict=True):
            assert torch.equal(first, root.embed(x))
            assert torch.equal(inner, root.embed(2 * x))
            assert torch.equal(second, outputs(root, lambda x=x: root(x))["layers.0.attn"][0])
