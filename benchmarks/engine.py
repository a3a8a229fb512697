"""What names cost on vLLM: generation of 64 prompts that is steered at one layer, and one layer collected of 500 prompts.

Contenders that do the same work, in turn: plain vLLM; plain vLLM with a forward hook of torch's on the layer; this library on vLLM,
in this process and at a server in another one; this library on Transformers. Each text and value is compared with the hook's.

    make vllm && .venv-vllm/bin/python benchmarks/engine.py [--rounds 5] [--without transformers server]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.core.run import Run
from nnatomy.remote.tensor import RemoteTensor

LAYER, STRENGTH = 14, 4.0
STEERED, BATCH = 64, 50
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "kv_cache_memory_bytes": 1 << 30,
    "max_num_seqs": STEERED,
}


def prompts(count: int, tokenizer: Any) -> list[list[int]]:
    """Sentences of 8 to 20 tokens or so."""
    things = [
        "a river",
        "the old clock",
        "her brother",
        "that small town",
        "the second train",
        "an open window",
        "his answer",
    ]
    ends = [
        "was there",
        "came late and left early",
        "did not change for many years",
        "is what people talked about in the evening",
    ]
    texts = [f"Story {i}: {things[i % 7]} {ends[i % 4]}, and {things[(3 * i + 1) % 7]}" for i in range(count)]
    return [tokenizer(text).input_ids for text in texts]


class Contenders:
    """The same work by each: `steer` gives texts' token ids, `collect` the layer of each prompt."""

    def __init__(self, without: Sequence[str], tokens: int, collected: int) -> None:
        self.tokens = tokens
        self.model = StandardizedTransformer("demo:smollm2", engine="vllm", validate="algebra", **ENGINE)
        self.engine = self.model.engine
        self.few = prompts(STEERED, self.model.tokenizer)
        self.many = prompts(collected, self.model.tokenizer)
        self.direction = STRENGTH * torch.randn(self.model.hidden_size, generator=torch.Generator().manual_seed(0))
        self.layer = self.model.layers[LAYER].module
        self.there = self.hf = None
        if "server" not in without:
            own: dict[str, Any] = {"distributed_executor_backend": "mp", "validate": "algebra", **ENGINE}
            self.there = StandardizedTransformer("demo:smollm2", engine="vllm", **own)
        if "transformers" not in without:
            self.hf = StandardizedTransformer("demo:smollm2", dtype=torch.float32, validate=False)

    # Steering.

    def plain(self) -> list[list[int]]:
        """Plain vLLM, without steering: what the others are measured by."""
        params = self.engine.vllm.SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True)
        given = [{"prompt_token_ids": ids} for ids in self.few]
        return [list(one.outputs[0].token_ids) for one in self.engine.llm.generate(given, params, use_tqdm=False)]

    def by_hook(self) -> list[list[int]]:
        """Plain vLLM with a hook that adds the direction to the first of the pair."""
        handle = self.layer.register_forward_hook(lambda _, __, out: (out[0] + self.direction, out[1]))
        try:
            return self.plain()
        finally:
            handle.remove()

    def ours(self) -> list[list[int]]:
        return self._steered(self.model)

    def ours_there(self) -> list[list[int]]:
        return self._steered(self.there)

    def _steered(self, model: Any) -> list[list[int]]:
        def steer() -> None:
            model.layers_output[LAYER] += self.direction

        done = model.edit(steer).generate(self.few, max_new_tokens=self.tokens, ignore_eos=True).run()
        return [list(one.outputs[0].token_ids) for one in done]

    def ours_attached(self) -> list[list[int]]:
        """The same by an attached module, which the forward pass calls itself."""
        done = self.model.attach(f"layers_output[{LAYER}]", Adds(self.direction), how="replace", name="steering")
        return [
            list(one.outputs[0].token_ids)
            for one in done.generate(self.few, max_new_tokens=self.tokens, ignore_eos=True).run()
        ]

    def ours_on_transformers(self) -> list[list[int]]:
        model = self.hf
        assert model is not None

        def steer() -> None:
            model.layers_output[LAYER] += self.direction

        with torch.no_grad():
            done = (
                model.edit(steer)
                .generate(self.few, max_new_tokens=self.tokens, min_new_tokens=self.tokens, do_sample=False)
                .run()
            )
        return done[:, -self.tokens :].tolist()

    # Collecting.

    def pass_by(self) -> list[Tensor]:
        """Plain vLLM, which collects nothing: one token for each prompt."""
        params = self.engine.vllm.SamplingParams(temperature=0, max_tokens=1)
        for i in range(0, len(self.many), BATCH):
            given = [{"prompt_token_ids": ids} for ids in self.many[i : i + BATCH]]
            self.engine.llm.generate(given, params, use_tqdm=False)
        return []

    def collect_by_hook(self) -> list[Tensor]:
        """The same with a hook."""
        found: list[Tensor] = []
        handle = self.layer.register_forward_hook(lambda _, __, out: found.append(out[0] + out[1]))
        try:
            self.pass_by()
        finally:
            handle.remove()
        return list(torch.cat(found).split([len(ids) for ids in self.many]))

    def collect_ours(self) -> list[Tensor]:
        return self._collect(self.model)

    def collect_ours_there(self) -> list[Tensor]:
        return self._collect(self.there)

    def collect_ours_on_transformers(self) -> list[Tensor]:
        with torch.no_grad():
            return self._collect(self.hf)

    def _collect(self, model: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for i in range(0, len(self.many), BATCH):
            batch = self.many[i : i + BATCH]
            with model.trace(batch):
                stream = model.layers_output[LAYER]
            stream = stream.local() if isinstance(stream, RemoteTensor) else stream
            found += [row[-len(ids) :] for row, ids in zip(stream, batch, strict=True)]
        return found


def stands_still(steered: Callable[[], Any]) -> tuple[int, float, float]:
    """How often the model stands still for an edit, for how many seconds in all, and how long the whole takes.

    That is what an edit adds, changes of thread included, and it says so where the times of whole runs differ by more.
    """
    waits: list[float] = []
    hand_over = Run._hand_over

    def timed(run: Run, slot: Any) -> None:
        began = time.perf_counter()
        hand_over(run, slot)
        waits.append(time.perf_counter() - began)

    began = time.perf_counter()
    Run._hand_over = timed  # type: ignore[method-assign]
    try:
        steered()
    finally:
        Run._hand_over = hand_over  # type: ignore[method-assign]
    return len(waits), sum(waits), time.perf_counter() - began


class Adds(torch.nn.Module):
    """Adds a direction."""

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.register_buffer("direction", direction)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.direction


def in_turn(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each, round by round: by the clock, and of the processor, which does not count waiting for a busy core, or what
    another process does."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return times


def table(title: str, times: dict[str, list[tuple[float, float]]]) -> None:
    first = next(iter(times.values()))
    print(f"\n| {title} | s | times {next(iter(times))} | in processor time |\n|---|---|---|---|")
    for name, found in times.items():
        clock, cpu = (statistics.median(b[i] / a[i] for a, b in zip(first, found, strict=True)) for i in (0, 1))
        print(f"| {name} | {statistics.median(one for one, _ in found):.2f} | {clock:.2f} | {cpu:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--collected", type=int, default=500)
    parser.add_argument("--without", nargs="*", default=[])
    options = parser.parse_args()
    all_of = Contenders(options.without, options.tokens, options.collected)
    threads, python = torch.get_num_threads(), sys.version.split()[0]
    print(f"vLLM {all_of.engine.vllm.__version__}, torch {torch.__version__}, {threads} threads, Python {python}")
    steering: dict[str, Callable[[], Any]] = {
        "plain vLLM": all_of.plain, "a hook": all_of.by_hook, "nnatomy, an edit": all_of.ours,
        "nnatomy, an attached module": all_of.ours_attached,
    }  # fmt: skip
    collecting: dict[str, Callable[[], Any]] = {
        "plain vLLM": all_of.pass_by, "a hook": all_of.collect_by_hook, "nnatomy": all_of.collect_ours,
    }  # fmt: skip
    if all_of.there is not None:
        steering["nnatomy, an edit, at a server"] = all_of.ours_there
        collecting["nnatomy, at a server"] = all_of.collect_ours_there
    if all_of.hf is not None:
        steering["nnatomy on Transformers"] = all_of.ours_on_transformers
        collecting["nnatomy on Transformers"] = all_of.collect_ours_on_transformers
    texts = {name: run() for name, run in steering.items()}  # this warms all of them up, too
    wanted = texts["a hook"]
    for name, one in texts.items():
        same = sum(a == b for a, b in zip(one, wanted, strict=True))
        print(f"{name}: {same} of {STEERED} texts as by a hook", flush=True)
    table(
        f"{STEERED} prompts, {options.tokens} tokens each, steered at layer {LAYER}", in_turn(steering, options.rounds)
    )
    for _ in range(3):
        count, waited, whole = stands_still(all_of.ours)
        print(f"an edit: the model stands still {count} times, {waited * 1e3:.1f} ms of {whole:.2f} s", flush=True)
    values = {name: run() for name, run in collecting.items()}
    for name, one in values.items():
        if not one:
            continue
        off = max(float((a - b).abs().max()) for a, b in zip(one, values["a hook"], strict=True))
        largest = max(float(a.abs().max()) for a in one)
        print(f"{name}: off a hook's values by {off:.1e} at most, of values up to {largest:.0f}", flush=True)
    table(f"layer {LAYER} of {options.collected} prompts", in_turn(collecting, max(1, options.rounds // 3)))


if __name__ == "__main__":
    main()
