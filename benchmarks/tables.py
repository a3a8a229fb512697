"""Benchmarks of methods: tasks that each contender does, timed in turn and printed as a table.

    python benchmarks/SCRIPT.py [--json FILE] [--rounds N] [--tasks NAME ...] [--without NAME ...] [--no-memory]

Results are checked to agree within 1e-4 of the largest value before anything is timed. "times ours" is a contender's time as a
multiple of ours, the median over the rounds of the ratio within a round. The floor is what cannot be saved: the layers
and head products that each such result needs, called by themselves. Peak memory as in `memory.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import Contender, measure, versions
from memory import peak, peak_elsewhere
from transformers.utils import logging


@dataclass(frozen=True)
class Task:
    """What each contender does.

    Attributes:
        contenders: "ours" first; each gives a tensor.
        floor: the part of it that cannot be saved.
        targets: by contender, how many times as fast ours should be.
    """

    contenders: dict[str, Contender]
    floor: Contender
    targets: dict[str, float] = field(default_factory=dict)


def agree(values: dict[str, Any]) -> bool:
    """Whether the contenders' results are the same but for rounding."""
    ours = values["ours"]
    others = [value for name, value in values.items() if name != "floor"]
    return all(one.shape == ours.shape and bool((one - ours).abs().max() <= 1e-4 * ours.abs().max()) for one in others)


def main(document: str | None, tasks: dict[str, Callable[[], Task]], rounds: int) -> None:
    """Measure and print a table; `tasks` makes each task by its name."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        # Logits of 25 MB, each time in new pages of one arena or another, are 40 ms of noise.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_ARENA_MAX": "1"})
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--tasks", nargs="*", choices=list(tasks), default=list(tasks), metavar="NAME")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders to leave out")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory", nargs=2, metavar=("TASK", "NAME"), help="MB of one, in this process")
    options = parser.parse_args()
    if options.memory:
        name, contender = options.memory
        print(*peak(tasks[name]().contenders[contender]))
        return
    everything: dict[str, Any] = {"versions": versions()}
    print(everything["versions"])
    print(
        "\n| task | contender | time | times ours (min-max) | target | peak memory (above before) |\n"
        + "|---" * 6
        + "|"
    )
    for name in options.tasks:
        task = tasks[name]()
        contenders = {each: run for each, run in task.contenders.items() if each not in options.without} | {
            "floor": task.floor
        }
        figures = everything[name] = measure(contenders, 1, options.rounds, agree)
        figures["MB"] = {}
        for contender in contenders:
            if contender != "floor" and not options.no_memory:
                figures["MB"][contender] = peak_elsewhere(name, contender)
            print(line(name, contender, figures, task.targets.get(contender)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


def line(task: str, contender: str, figures: dict[str, Any], target: float | None) -> str:
    """One row of the table."""
    ratio, aim = "", ""
    if contender != "ours":
        middle, least, most = (1 / one for one in figures[f"ours/{contender}"])
        ratio = f"{middle:.2f} ({most:.2f}-{least:.2f})"
        aim = "" if target is None else f"{target:g}: {'met' if middle >= target else 'missed'}"
    whole, above = figures["MB"].get(contender, ("-", "-"))
    memory = "" if whole == "-" else f"{whole:.0f} ({above:.0f}) MB"
    return f"| {task} | {contender} | {figures[contender] / 1e3:.1f} ms | {ratio} | {aim} | {memory} |"
