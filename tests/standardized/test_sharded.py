"""Models in the hands of FSDP2, in a process of their own (process groups are one for a process): see `sharded_models`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_models.py")
#: The checks in it; how often each is made.
CHECKS = {
    "reads_edits_and_steps": 5,
    "the_head_is_the_models": 5,
    "what_is_left_early_is_in_order": 2,
    "gradients_reach_every_shard": 2,
    "methods_and_modules_of_ones_own": 2,
    "shapes_alone": 1,
    "sharded_after_loading": 1,
    "in_a_wrapper_that_is_the_root": 1,
    "encoder_decoders": 2,
    "mixed_precision": 1,
    "split_over_processes": 1,
}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, str] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("check", list(CHECKS))
def test_sharded(check: str, found: dict[str, str]) -> None:
    mine = {name: how for name, how in found.items() if re.fullmatch(rf"{check}(\[.*\])?", name)}
    assert len(mine) == CHECKS[check]
    assert not any(mine.values()), "\n".join(mine.values())
