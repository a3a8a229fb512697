"""The peak of resident memory (Linux alone): each contender in fresh processes, once to warm up and then three times.

One process differs from the next by 10 MB, so the medians of several are compared.

There malloc maps each block of 256 KiB or more on its own: left to itself it puts logits of 25 MB now here, now there,
which is 20 MB of noise.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnatomy.core.worker import IDLE_SECONDS

PROCESSES = 3


def peak(run: Callable[[], Any]) -> tuple[float, float]:
    """MB resident at the peak of the work, and above what was before, in this process: the medians of three times."""
    peaks = []
    run()
    time.sleep(IDLE_SECONDS + 1)  # a thread that has run the model at load ends, with 13 MB that are no contender's own
    for _ in range(3):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        run()
        highest = status("VmHWM")
        peaks.append((highest / 1024, (highest - before) / 1024))
    whole, above = map(statistics.median, zip(*peaks, strict=True))
    return whole, above


def status(name: str) -> int:
    """A figure of this process, in KiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def peak_elsewhere(row: str, contender: str, *options: str) -> list[float]:
    """The same of one contender: the medians of fresh processes that run this script with `--memory`."""
    command = [sys.executable, sys.argv[0], *options, "--memory", row, contender]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    peaks = []
    for _ in range(PROCESSES):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks.append([float(figure) for figure in done.stdout.split()[-2:]])
    return [statistics.median(each) for each in zip(*peaks, strict=True)]
