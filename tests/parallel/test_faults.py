"""A rank that fails, or is killed: the others are told why in bounded time, and no process is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from architectures import build
from parallel.ranks import FAULTS, ended, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(place)
    return place


#: By fault, what each rank is told; None of the one that is killed.
TOLD: dict[str, tuple[str, str | None]] = {
    "killed_in_a_forward": ("told: RanksError: Another rank of this model has failed or is gone", None),
    "killed_in_a_block": ("told: RanksError: A rank of this model is gone", None),
    "fails_in_a_forward": (
        "first: RanksError: Another rank of this model has failed or is gone, while this one waited for it in the forward pass. "
        "There: rank 1: MemoryError: no memory here.",
        "first: MemoryError: no memory here",
    ),
    "raises_in_a_block": (
        "told: RanksError: The block has been left by an exception, which ends the trace on every rank; on rank 1: ValueError: "
        "mine, at (1, 2, 9, 8)",
        "told: ValueError: mine, at (1, 2, 9, 8)",
    ),
}


@pytest.mark.parametrize("fault", list(TOLD))
def test_the_other_ranks_are_told(fault: str, folder: Path) -> None:
    results = ended(start(FAULTS, 2, str(folder), fault), 60)
    for rank, (code, text) in enumerate(results):
        told = TOLD[fault][rank]
        assert code == (-9 if told is None else 0), text
        if told is not None:
            assert told in text, text
            seconds = re.search(r"seconds: ([\d.]+)", text)
            assert seconds is not None, text
            assert float(seconds[1]) < 20, text
    if fault == "fails_in_a_forward":  # and then nothing can go on
        assert all("told: RanksError" in text and "Start the processes anew" in text for _, text in results), results
