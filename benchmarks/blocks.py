"""Several blocks, generation and caches: nnatomy, plain PyTorch hooks and (if it is installed) nnsight, in one run.

    python benchmarks/blocks.py [--json FILE] [--rounds N] [--rows TEXT] [--no-memory]

A random model of GPT-2's size and a tokenizer made here; prompts of one length, so that nobody pads. Time as in
`tracing.py`, of one trace after one that is not timed, each contender in a process of its own. Memory as in `memory.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from apart import Apart, serve
from measuring import Rows, agree, hooked, measure, nnsight, versions
from memory import peak, peak_elsewhere
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging
from words import make_prompts, make_tokenizer

from nnatomy import StandardizedTransformer

PROMPTS, LENGTH, STEPS = 8, 16, 20
TRACES = 1
EARLY, EDITED = 3, 6


def rows(check: bool = True) -> Rows:
    """Each row's contenders.

    Args:
        check: whether to see that an edit shows, which runs the model in this thread: that leaves it 20 MB of buffers.
    """
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(eos_token_id=None, bos_token_id=None, pad_token_id=0)).eval()
    tokenizer, prompts = make_tokenizer(), make_prompts(PROMPTS, LENGTH, LENGTH)
    vector = torch.randn(hf.config.n_embd)
    greedy = {"max_new_tokens": STEPS, "do_sample": False}
    blocks = hf.transformer.h
    model = StandardizedTransformer(hf, tokenizer)
    with model.trace(prompts) as tracer:
        called = tracer.cache()
    paths = list(called)  # GPT-2 has a dropout module that SDPA leaves out
    del called

    def tokenized(prompts: list[str]) -> dict[str, Tensor]:
        encoded = tokenizer(prompts, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def read_early() -> Any:
        reads = []
        with model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    model.layers_output[EARLY][:, -1] += vector
                    reads.append(model.layers_output[EDITED])
        return reads

    def edit_in_place() -> Any:
        ends = []
        with model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    model.layers_output[EDITED][:, -1] += vector
                    ends.append(model.logits[:, -1])
        return ends

    def edit_assigned() -> Any:
        ends = []
        with model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    model.layers_output[EDITED] = model.layers_output[EDITED] + vector
                    ends.append(model.logits[:, -1])
        return ends

    def two_reads() -> Any:
        reads, ends = [], []
        with model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    reads.append(model.layers_output[EARLY])
                    model.layers_output[EDITED][:, -1] += vector
                    ends.append(model.logits[:, -1])
        return reads + ends

    def generation() -> Any:
        with model.generate(prompts[0], **greedy) as tracer:
            for _ in tracer.iter[:]:
                model.layers_output[EDITED] = model.layers_output[EDITED] + vector
            tokens = tracer.result
        return tokens

    def cache() -> Any:
        with model.trace(prompts) as tracer:
            kept = tracer.cache()
        return [tensor_of(kept[path].output) for path in paths]

    # By hooks.

    def add_to_last(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output[:, -1] += vector

    def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + vector

    def with_hook(layer: int, hook: Callable[..., Any], read: list[nn.Module]) -> list[Any]:
        with ExitStack() as stack:
            stack.callback(blocks[layer].register_forward_hook(hook).remove)
            return hooked(read, lambda: hf(**tokenized(prompts)))

    def ends_of(result: Any) -> list[Tensor]:
        return list(result.logits[:, -1].split(1))

    def hooks_two_reads() -> Any:
        read, result = with_hook(EDITED, add_to_last, [blocks[EARLY]])
        return [*read.split(1), *ends_of(result)]

    def hooks_generation() -> Any:
        with ExitStack() as stack:
            stack.callback(blocks[EDITED].register_forward_hook(add).remove)
            return hf.generate(**tokenized(prompts[:1]), **greedy)

    def hooks_cache() -> Any:
        kept: dict[str, Any] = {}
        with ExitStack() as stack:
            for path, module in hf.named_modules():
                hook = module.register_forward_hook(lambda _, __, out, path=path: kept.update({path: out}))
                stack.callback(hook.remove)
            hf(**tokenized(prompts))
        return [tensor_of(kept[path]) for path in paths]

    if check:
        unedited = hf.generate(**tokenized(prompts[:1]), **greedy)
        assert not agree({"edited": hooks_generation(), "not": unedited}), "the edit has to show"
    table: Rows = {
        "eight invokes, an edit and a later layer": {
            "ours": read_early,
            "hooks": lambda: list(with_hook(EARLY, add_to_last, [blocks[EDITED]])[0].split(1)),
        },
        "eight invokes, an edit in place and logits": {
            "ours": edit_in_place,
            "hooks": lambda: ends_of(with_hook(EDITED, add_to_last, [])[0]),
        },
        "eight invokes, an edit assigned and logits": {
            "ours": edit_assigned,
            "hooks": lambda: ends_of(with_hook(EDITED, add, [])[0]),
        },
        "eight invokes, an edit in place and two reads": {"ours": two_reads, "hooks": hooks_two_reads},
        "an edit in each of 20 steps": {"ours": generation, "hooks": hooks_generation},
        "a cache of all modules": {"ours": cache, "hooks": hooks_cache},
    }
    if nnsight is None:
        return table

    # With nnsight.

    # A model of its own: it puts wrappers on the modules for good, which the other contenders would run too.
    sight = nnsight.TransformersModel(copy.deepcopy(hf), tokenizer=tokenizer, task="text-generation")
    layers = sight.transformer.h

    def sight_read_early() -> Any:
        with sight.trace() as tracer:
            reads = nnsight.save([])
            for prompt in prompts:
                with tracer.invoke(prompt):
                    layers[EARLY].output[:, -1] += vector
                    reads.append(layers[EDITED].output)
        return reads

    def sight_edit_in_place() -> Any:
        with sight.trace() as tracer:
            ends = nnsight.save([])
            for prompt in prompts:
                with tracer.invoke(prompt):
                    layers[EDITED].output[:, -1] += vector
                    ends.append(sight.output.logits[:, -1])
        return ends

    def sight_edit_assigned() -> Any:
        with sight.trace() as tracer:
            ends = nnsight.save([])
            for prompt in prompts:
                with tracer.invoke(prompt):
                    layers[EDITED].output = layers[EDITED].output + vector
                    ends.append(sight.output.logits[:, -1])
        return ends

    def sight_two_reads() -> Any:
        with sight.trace() as tracer:
            reads, ends = nnsight.save([]), nnsight.save([])
            for prompt in prompts:
                with tracer.invoke(prompt):
                    reads.append(layers[EARLY].output)
                    layers[EDITED].output[:, -1] += vector
                    ends.append(sight.output.logits[:, -1])
        return reads + ends

    def sight_generation() -> Any:
        with sight.generate(prompts[0], **greedy) as tracer:
            for _ in tracer.iter[:STEPS]:
                layers[EDITED].output = layers[EDITED].output + vector
            tokens = tracer.result.save()
        return tokens

    def sight_cache() -> Any:
        with sight.trace(prompts) as tracer:
            kept = tracer.cache()
        return [tensor_of(kept[f"model.{path}" if path else "model"].output) for path in paths]

    sights = (
        *(sight_read_early, sight_edit_in_place, sight_edit_assigned, sight_two_reads),
        *(sight_generation, sight_cache),
    )
    for row, contender in zip(table.values(), sights, strict=True):
        row["nnsight"] = contender
    return table


def tensor_of(output: Any) -> Tensor:
    """The first tensor of a module's output."""
    return output if isinstance(output, Tensor) else output[0]


def main() -> None:
    """Measure and print tables."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        # Logits of 25 MB, each time in new pages of one arena or another, are 40 ms of noise.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_ARENA_MAX": "1"})
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only those with this in their name")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory", nargs=2, metavar=("ROW", "CONTENDER"), help="MB of one, in this process")
    parser.add_argument("--together", action="store_true", help="all contenders in one process")
    parser.add_argument("--serve", metavar="CONTENDER", help="answer `apart.py`")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, {"": rows})
        return
    if options.memory:
        row, contender = options.memory
        print(*peak(rows(check=False)[row][contender]))
        return
    everything: dict[str, Any] = {"versions": versions()}
    print(everything["versions"])
    print("\n| time | ours | hooks | nnsight | ours/hooks | ours/nnsight (min-max) | of the least |")
    print("|---" * 7 + "|")
    table, apart = {name: row for name, row in rows().items() if options.rows in name}, Apart()
    for row, contenders in table.items():
        elsewhere = None if options.together else partial(apart.time, "", row, TRACES)
        figures = everything[row] = measure(contenders, TRACES, options.rounds, elsewhere=elsewhere)
        least, nan = figures["least"], float("nan")
        sight, sight_least = figures.get("ours/nnsight", [nan] * 3), least.get("nnsight", nan)
        times = " | ".join(f"{figures.get(name, nan) / 1e3:.1f} ms" for name in ("ours", "hooks", "nnsight"))
        print(
            f"| {row} | {times} | {figures['ours/hooks'][0]:.2f} | {sight[0]:.2f} ({sight[1]:.2f}-{sight[2]:.2f}) "
            f"| {least['ours'] / least['hooks']:.2f}, {least['ours'] / sight_least:.2f} |",
            flush=True,
        )
    if options.no_memory:
        table = {}
    print("\n| memory: peak (above before) | ours | hooks | nnsight | ours/nnsight, of the peak |\n" + "|---" * 5 + "|")
    for row, contenders in table.items():
        peaks = everything[f"{row}, MB"] = {name: peak_elsewhere(row, name) for name in contenders}
        none = [float("nan")] * 2
        figures = [peaks.get(name, none) for name in ("ours", "hooks", "nnsight")]
        sizes = " | ".join(f"{whole:.0f} ({above:.1f}) MB" for whole, above in figures)
        print(f"| {row} | {sizes} | {figures[0][0] / figures[2][0]:.3f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
