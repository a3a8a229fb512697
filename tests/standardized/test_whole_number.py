"""Whole numbers: of which kinds they may be. What is none, masks among them, is in wrong_use.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnatomy.whole_number import count_of, is_truth, whole_number


def test_numbers_of_numpy_and_of_a_tensor_are_numbers() -> None:
    script = Path(__file__).with_name("numbers_given.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("given", [True, np.True_, torch.tensor(True)])
def test_a_truth_is_no_number(given: object) -> None:
    assert is_truth(given)
    with pytest.raises(TypeError):
        whole_number(given)


@pytest.mark.parametrize(
    ("given", "count"), [(np.int64(3), 3), (torch.tensor(2), 2), (1, 1), (0, 0), (-4, 0), (True, 0), (1.5, 0), ("2", 0)]
)
def test_a_count_is_one_or_more(given: object, count: int) -> None:
    assert count_of(given) == count
