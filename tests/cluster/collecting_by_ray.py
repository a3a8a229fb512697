"""Collects by workers of Ray into a folder: `collecting_by_ray.py FOLDER [slow]`.

Where it is slow the worker that is first in the middle of writing shard 4 is killed there, and shards 14 to 19 are never
written.
"""

import os
import signal
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "methods")]


def in_each_worker() -> None:
    """What a process of Ray's does first."""
    sys.path[:0] = [str(TESTS), str(TESTS / "methods")]
    marker, replace = Path(os.environ["KILLED_ONCE"]), os.replace

    def slowly(source: Path, place: Path) -> None:
        if str(place).endswith("000004.safetensors") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while place.suffix == ".safetensors" and int(place.stem) >= 14:
            time.sleep(0.2)
        replace(source, place)

    os.replace = slowly  # type: ignore[assignment]


def main(folder: str, slow: bool) -> None:
    import ray
    import torch
    from architectures import build
    from killed_collecting import prompts

    from nnatomy import StandardizedTransformer
    from nnatomy.methods import collect_activations

    torch.set_num_threads(1)
    model = StandardizedTransformer(build("gpt2"))
    given = {"points": {"layers_output": [0, 1], "mlps_contribution": [1]}, "positions": "all", "batch_size": 2}
    given |= {"prompts_per_shard": 3, "progress": False}
    if slow:
        collect_activations(model, prompts(), folder=f"{folder}-whole", **given)
        hook = {"runtime_env": {"worker_process_setup_hook": in_each_worker}}
        ray.init(
            "local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False, **hook
        )
    collect_activations(model, prompts(), folder=folder, engine="ray", workers=2, **given)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["slow"])
