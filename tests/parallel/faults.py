"""What becomes of the other ranks when one fails: `faults.py FOLDER FAULT` on each rank prints what it was told.

The model lies in the folder. Rank 1 is the one that fails.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from nnatomy import StandardizedTransformer

IDS = torch.arange(5, 14)[None]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def killed_in_a_forward(model: Any, rank: int) -> None:
    """The process of rank 1 is gone while its layers run."""
    if rank == 1:
        model.hf_model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with torch.no_grad(), model.trace(IDS):
        model.logits


def killed_in_a_block(model: Any, rank: int) -> None:
    """... while its block is at work."""
    with torch.no_grad(), model.trace(IDS):
        model.layers_output[0]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        model.layers_output[2]


def fails_in_a_forward(model: Any, rank: int) -> None:
    """The model raises on rank 1 alone, which goes on afterwards."""

    def fail(*_: Any) -> None:
        raise MemoryError("no memory here")

    hook = model.hf_model.model.layers[1].mlp.register_forward_pre_hook(fail) if rank == 1 else None
    try:
        with torch.no_grad(), model.trace(IDS):
            model.layers_output[0]
            model.logits
    except Exception as error:
        say(f"first: {type(error).__name__}: {error}")
    if hook is not None:
        hook.remove()
    with torch.no_grad(), model.trace(IDS):
        model.logits


def raises_in_a_block(model: Any, rank: int) -> None:
    """An exception of the user's, that nobody catches."""
    with torch.no_grad(), model.trace(IDS):
        keys: Tensor = model.keys[1]
        if rank == 1:
            raise ValueError(f"mine, at {tuple(keys.shape)}")
        model.logits


def main() -> None:
    began, (_, folder, fault) = time.monotonic(), sys.argv
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = StandardizedTransformer(folder, tp_plan="auto")
    began = time.monotonic()
    try:
        globals()[fault](model, dist.get_rank())
    except Exception as error:
        say(f"told: {type(error).__name__}: {error}")
    say(f"seconds: {time.monotonic() - began:.1f}")
    os._exit(0)  # without waiting for the others


if __name__ == "__main__":
    main()
