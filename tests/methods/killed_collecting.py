"""Collects into a folder in forked processes that are killed at random moments, until one ends: `killed_collecting.py FOLDER`."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from architectures import build
from tqdm import tqdm

from nnatomy import StandardizedTransformer
from nnatomy.methods import collect_activations


def prompts() -> list[list[int]]:
    """60 prompts of 1 to 12 tokens."""
    draw = random.Random(1)
    return [[draw.randrange(3, 67) for _ in range(draw.randrange(1, 13))] for _ in range(60)]


def collect(model: StandardizedTransformer, folder: str) -> None:
    """In 20 shards."""
    points = {"layers_output": [0, 1], "mlps_contribution": [1]}
    collect_activations(
        model,
        prompts(),
        points=points,
        positions="all",
        batch_size=2,
        folder=folder,
        prompts_per_shard=3,
        progress=False,
    )


def main(folder: str) -> None:
    """Prints how many were killed, and how many shards each of them left."""
    torch.set_num_threads(1)
    # Its own lock is common to forked processes, and one that is killed may keep it.
    tqdm.set_lock(threading.RLock())
    model = StandardizedTransformer(build("gpt2"))
    start = time.perf_counter()
    collect(model, f"{folder}-whole")
    whole = time.perf_counter() - start
    draw, left = random.Random(2), []
    while True:
        if not (child := os.fork()):
            collect(model, folder)
            os._exit(0)
        enough = shards(folder) + draw.randrange(4)  # by shards, as a machine's speed may change meanwhile
        while shards(folder) < enough and not ended(child):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, whole / 40))
        if not ended(child):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            sys.stdout.write(f"{len(left)} {' '.join(map(str, left))}")
            sys.stdout.flush()
            sys.exit(os.WEXITSTATUS(status))
        left.append(shards(folder))


def shards(folder: str) -> int:
    """How many are done."""
    return len(list(Path(folder).glob("*.safetensors")))


def ended(child: int) -> bool:
    """Whether the process is through, which can be asked again."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    main(sys.argv[1])
