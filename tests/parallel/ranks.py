"""Running checks on several ranks: processes of their own, which talk by gloo on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remote_server import free_port

CHECKS, FAULTS = (Path(__file__).with_name(name) for name in ("checks.py", "faults.py"))


def start(script: Path, ranks: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The processes, one for each rank, at work."""
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    common |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """The exit codes of the processes and what they have printed; those that have not ended in time are killed (code -9)."""
    results = []
    try:
        for process in processes:
            try:
                text, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                text, _ = process.communicate()
            results.append((process.returncode, text))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return results


def checked(ranks: int, checks: Sequence[str], seconds: float = 280) -> dict[str, str]:
    """By check, how it failed on any rank; "" where it held on all."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start(CHECKS, ranks, folder, *checks)
        for rank, (code, text) in enumerate(ended(processes, seconds)):
            assert code == 0, f"rank {rank} ended with {code}:\n{text[-4000:]}"
        found: list[dict[str, Any]] = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return {check: "\n".join(filter(None, (one[check] for one in found))) for check in checks}
