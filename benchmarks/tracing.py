"""Trace overhead: nnatomy, plain PyTorch hooks and (if it is installed) nnsight, in one run, on the same work.

    python benchmarks/tracing.py [--json FILE]

Each round runs every contender of a row once after the other, a batch of repetitions each, in a process of its own
(`--together`: all in one); a row's figure is the median over the rounds of the time ratio within a round. Before a row
is timed, the contenders' values are checked to agree.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from apart import Apart, serve
from measuring import Rows, hooked, measure, nnsight, versions
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnatomy.tracing import Traceable

if nnsight is not None:
    from nnsight import NNsight


def mlp_rows() -> Rows:
    """Twelve layers of width 64, one sample."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.ReLU())])
    x = torch.randn(1, 64)
    net = Traceable(model)
    places = list(range(0, 24, 2))
    views = [net[i] for i in places]
    modules = [model[i] for i in places]

    def none() -> Any:
        with net.trace(x, early_stop=False) as tracer:
            pass
        return tracer.result

    def one() -> Any:
        with net.trace(x):
            value = net[12].output
        return value

    def twelve() -> Any:
        with net.trace(x):
            values = [net[i].output for i in places]
        return values

    def cache() -> Any:
        with net.trace(x) as tracer:
            kept = tracer.cache(views)
        return [kept[view].output for view in views]

    def result() -> Any:
        with net.trace(x) as tracer:
            values = [net[i].output for i in places]
            values.append(tracer.result)
        return values

    rows: Rows = {
        "no read": {"ours": none, "hooks": lambda: model(x)},
        "one read in the middle": {
            "ours": one,
            "hooks": lambda: hooked([model[12]], lambda: model(x))[0],
        },
        "twelve single reads": {
            "ours": twelve,
            "hooks": lambda: hooked(modules, lambda: model(x))[:-1],
        },
        "twelve by a cache": {"ours": cache, "hooks": lambda: hooked(modules, lambda: model(x))[:-1]},
        "twelve reads and the result": {
            "ours": result,
            "hooks": lambda: hooked(modules, lambda: model(x)),
        },
    }
    if nnsight is not None:
        wrapped = NNsight(model)

        def sight_none() -> Any:
            with wrapped.trace(x) as tracer:
                value = tracer.result.save()
            return value

        def sight_one() -> Any:
            with wrapped.trace(x):
                value = wrapped[12].output.save()
            return value

        def sight_twelve() -> Any:
            values = []
            with wrapped.trace(x):
                for i in places:
                    values.append(wrapped[i].output.save())
            return values

        def sight_cache() -> Any:
            with wrapped.trace(x) as tracer:
                kept = tracer.cache(modules=[wrapped[i] for i in places]).save()
            return [kept[f"model.{i}"].output for i in places]

        def sight_result() -> Any:
            values = []
            with wrapped.trace(x) as tracer:
                for i in places:
                    values.append(wrapped[i].output.save())
                values.append(tracer.result.save())
            return values

        sights = (sight_none, sight_one, sight_twelve, sight_cache, sight_result)
        for row, sight in zip(rows.values(), sights, strict=True):
            row["nnsight"] = sight
    return rows


class _StopError(Exception):
    pass


def cut(module: nn.Module, call: Callable[[], Any]) -> Any:
    """The output of `module` by a hook that stops the pass there: what no tracing can be faster than."""
    seen = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output)
        raise _StopError

    handle = module.register_forward_hook(stop)
    with suppress(_StopError):
        call()
    handle.remove()
    return seen[0]


def gpt2_rows(tokens: int) -> Rows:
    """A random model of GPT-2's size, one prompt."""
    from nnatomy import StandardizedTransformer

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    ids = torch.randint(0, 50257, (1, tokens))
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = StandardizedTransformer(hf)
    blocks = list(hf.transformer.h)

    def none() -> Any:
        with model.trace(**arguments, early_stop=False) as tracer:
            pass
        return tracer.result.logits

    def six() -> Any:
        with model.trace(**arguments):
            value = model.layers_output[6]
        return value

    def twelve() -> Any:
        with model.trace(**arguments):
            values = [model.layers_output[i] for i in range(12)]
        return values

    def a_slice() -> Any:
        with model.trace(**arguments):
            values = model.layers_output[:]
        return values

    def result() -> Any:
        with model.trace(**arguments) as tracer:
            values = [model.layers_output[i] for i in range(12)]
            values.append(tracer.result.logits)
        return values

    def plain() -> Any:
        return hf(**arguments).logits

    rows: Rows = {
        "no read": {"ours": none, "hooks": plain},
        "layer 6 alone": {
            "ours": six,
            "hooks": lambda: hooked([blocks[6]], plain)[0],
            "cut": lambda: cut(blocks[6], plain),
        },
        "twelve single reads": {"ours": twelve, "hooks": lambda: hooked(blocks, plain)[:-1]},
        "twelve by a slice": {"ours": a_slice, "hooks": lambda: hooked(blocks, plain)[:-1]},
        "twelve reads and the result": {"ours": result, "hooks": lambda: hooked(blocks, plain)},
    }
    if nnsight is not None:
        wrapped = NNsight(hf)

        def sight_none() -> Any:
            with wrapped.trace(**arguments) as tracer:
                value = tracer.result.logits.save()
            return value

        def sight_six() -> Any:
            with wrapped.trace(**arguments):
                value = wrapped.transformer.h[6].output.save()
            return value

        def sight_twelve() -> Any:
            values = []
            with wrapped.trace(**arguments):
                for i in range(12):
                    values.append(wrapped.transformer.h[i].output.save())
            return values

        def sight_result() -> Any:
            values = []
            with wrapped.trace(**arguments) as tracer:
                for i in range(12):
                    values.append(wrapped.transformer.h[i].output.save())
                values.append(tracer.result.logits.save())
            return values

        sights = (sight_none, sight_six, sight_twelve, sight_twelve, sight_result)
        for row, sight in zip(rows.values(), sights, strict=True):
            row["nnsight"] = sight
    return rows


#: What each row is aimed at: (model, row) -> the ratio it is about and the most it should be.
TARGETS = {
    ("mlp", "one read in the middle"): ("nnsight", 0.7),
    ("mlp", "twelve single reads"): ("nnsight", 1.3),
    ("mlp", "twelve by a cache"): ("nnsight", 0.8),
    ("gpt2", "no read"): ("nnsight", 1.0),
    ("gpt2", "layer 6 alone"): ("nnsight", 0.4),
    ("gpt2", "twelve single reads"): ("hooks", 1.02),
    ("gpt2", "twelve by a slice"): ("nnsight", 1.0),
    ("gpt2", "twelve reads and the result"): ("nnsight", 1.0),
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--models", nargs="*", default=["mlp", "gpt2"], choices=["mlp", "gpt2"])
    parser.add_argument("--together", action="store_true", help="all contenders in one process")
    parser.add_argument("--serve", metavar="CONTENDER", help="answer `apart.py`")
    options = parser.parse_args()
    makers = {
        "mlp": (mlp_rows, 200, 15),
        "gpt2, 8 tokens": (partial(gpt2_rows, 8), 5, 15),
        "gpt2, 32 tokens": (partial(gpt2_rows, 32), 5, 15),
    }
    torch.set_grad_enabled(False)
    if options.serve:
        serve(options.serve, {name: make for name, (make, _, _) in makers.items()})
        return
    everything: dict[str, Any] = {"versions": versions()}
    print(everything["versions"])
    apart = Apart()
    for name, (make, repetitions, rounds) in makers.items():
        if not name.startswith(tuple(options.models)):
            continue
        print(
            f"\n| {name} | ours | hooks | nnsight | ours/hooks | ours/nnsight (min-max) | target |\n" + "|---" * 7 + "|"
        )
        for row, contenders in make().items():
            elsewhere = None if options.together else partial(apart.time, name, row, repetitions)
            figures = measure(contenders, repetitions, rounds, elsewhere=elsewhere)
            everything[f"{name}: {row}"] = figures
            print(line(name.split(",")[0], row, figures), flush=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


def line(model: str, row: str, figures: dict[str, Any]) -> str:
    """One row of the table."""
    nan = [float("nan")] * 3
    hooks, sight = figures["ours/hooks"], figures.get("ours/nnsight", nan)
    other, most = TARGETS.get((model, row), ("", 0.0))
    reached = {"hooks": hooks, "nnsight": sight, "": nan}[other][0]
    floor = f" ({figures['ours/cut'][0]:.2f} x a hook that stops the pass there)" if "cut" in figures else ""
    target = f"{most} x {other}: {'met' if reached <= most else 'missed'}" if other else ""
    return (
        f"| {row} | {figures['ours']:.0f} µs | {figures['hooks']:.0f} µs | {figures.get('nnsight', nan[0]):.0f} µs "
        f"| {hooks[0]:.2f} | {sight[0]:.2f} ({sight[1]:.2f}-{sight[2]:.2f}) | {target}{floor} |"
    )


if __name__ == "__main__":
    main()
