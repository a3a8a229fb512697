"""Contenders timed in turn, each in a process of its own: what a user has who uses one of them.

In one process they are not independent: nnsight puts wrappers on the modules for good, and threads that compute in turn
take OpenMP's helpers from one another (see `README.md`). Whether they agree is checked in one process, before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

from measuring import Rows, timed


class Apart:
    """A process for each contender; it runs this script with `--serve`."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def time(self, model: str, row: str, repetitions: int, contender: str) -> float:
        """Microseconds a repetition."""
        if contender not in self._processes:
            command = [sys.executable, sys.argv[0], "--serve", contender]
            environment = dict(os.environ)
            if contender != "nnsight":
                environment["WITHOUT_NNSIGHT"] = "1"
            pipe = subprocess.PIPE
            self._processes[contender] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        process = self._processes[contender]
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([model, row, repetitions]), file=process.stdin, flush=True)
        return float(process.stdout.readline())


def serve(contender: str, makers: dict[str, Callable[[], Rows]]) -> None:
    """Answer such questions."""
    made: dict[str, Rows] = {}
    for line in sys.stdin:
        model, row, repetitions = json.loads(line)
        if model not in made:
            made = {model: makers[model]()}  # of one model at a time
        run = made[model][row][contender]
        timed(run, repetitions)  # what the others' turns have left: caches that are cold, cores that sleep
        print(timed(run, repetitions), flush=True)
