"""`make vllm`: a model that is split over two processes, each of which runs this file; its parent compares what both have written.

Called by `on_vllm/splitting.py`, as `torchrun --nproc-per-node 2 vllm_ranks.py FOLDER OUT`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from nnatomy import StandardizedTransformer

IDS = [[5, 9, 23, 4, 31], [7, 3, 3, 60, 12, 80, 44]]
NAMES = (
    "layers_output",
    "queries",
    "keys",
    "values",
    "attention_probabilities",
    "heads_output",
    "neurons",
    "mlps_output",
)


def main(folder: str, out: str) -> None:
    model = StandardizedTransformer(
        folder, engine="vllm", tensor_parallel_size=2, dtype="float32", max_model_len=64, kv_cache_memory_bytes=1 << 26
    )
    found: dict[str, object] = {"counts": model.validation.counts, "by": model.validation["validation"].detail}
    for name in NAMES:
        if getattr(model, name).layers:
            with model.trace(IDS):
                found[name] = getattr(model, name)[1].clone()
    with model.trace(IDS):
        model.heads_output[1][:, :, 1] = 0  # of one head, which one process has
        model.layers_output[1] = 2 * model.layers_output[1]
        found["logits"] = model.logits

    def steer() -> None:
        model.layers_output[0] += 0.5

    done = model.edit(steer).generate(IDS, max_new_tokens=4, ignore_eos=True).run()
    found["tokens"] = [list(one.outputs[0].token_ids) for one in done]
    with model.generate(IDS, max_new_tokens=3, ignore_eos=True) as tracer:
        for _ in tracer.iter[2]:
            found["keys so far"] = model.keys[2]
    torch.save(found, Path(out) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
