"""The processes that a test has started, and theirs: Ray starts many."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def started_by(pid: int) -> dict[int, str]:
    """Those that descend from it, by id, with their commands."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    found, new = {}, {pid}
    while new:
        new = {one for one, parent in parents.items() if parent in new}
        found |= {one: command(one) for one in new}
    return found


def command(pid: int) -> str:
    """What it calls itself; "" if it is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def named(pid: int, name: str) -> list[int]:
    """Those of its descendants whose command has the name."""
    return sorted(one for one, text in started_by(pid).items() if name in text)


def kill(pid: int) -> None:
    """At once, as a machine that fails does."""
    os.kill(pid, signal.SIGKILL)


def left_of(pids: dict[int, str], seconds: float) -> dict[int, str]:
    """Those that are still there after that time at most."""
    end = time.monotonic() + seconds
    while (
        left := {pid: text for pid, text in pids.items() if text and command(pid) == text}
    ) and time.monotonic() < end:
        time.sleep(0.1)
    return left
