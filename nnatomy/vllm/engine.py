"""The engine in this process: vLLM, its model, and the loop that runs requests on it in the thread of a run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, pairwise
from threading import Lock, get_ident
from typing import Any

import torch
from torch.nn import Module

from nnatomy.core.gates import runs
from nnatomy.core.thread_state import ThreadState
from nnatomy.errors import InputError, LoadError, UsageError
from nnatomy.vllm.arguments import check_settings, engine_arguments, import_vllm, sampling
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.run import EngineRun, Requests

#: Set while an engine is made: it runs in this process, and the runner is the one whose batch is known here.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}


class AnyEngine:
    """What traces need of an engine, which is in this process or at a server.

    Attributes:
        model: the model that it runs.
        sampler: what samples the tokens behind a step's rows.
        device: where values are.
        hf_config, text_config: the model's config, of Transformers, and the part of it that is of the language model.
        max_model_len: how many tokens a prompt has at most, with what is written behind it.
        step_tokens, step_requests: how many tokens a step computes at most, and of how many prompts.
        is_busy: whether a run is at work on it, or somebody has left requests in it.
    """

    model: Module
    sampler: Module
    device: torch.device
    hf_config: Any
    text_config: Any
    max_model_len: int
    step_tokens: int
    step_requests: int
    _prompts: Sequence[Sequence[int]] = ()

    def __init__(self) -> None:
        self._lock = Lock()

    @property
    def is_busy(self) -> bool:
        """See the attributes."""
        return self._lock.locked()

    def check_free(self) -> None:
        """Raise UsageError if it is at work."""
        if self.is_busy:
            raise UsageError(
                "The engine is at work on other requests: it runs one trace at a time. Leave the block of the other trace first, "
                "or let llm.generate(...) come to its end."
            )

    def length_of(self, request: int) -> int:
        """How many tokens that prompt has."""
        return len(self._prompts[request])

    def sampling(self, count: int, max_new_tokens: Any, params: Any, given: Mapping[str, Any]) -> list[Any]:
        """The sampling parameters of each of `count` prompts: see `nnatomy.vllm.arguments.sampling`."""
        raise NotImplementedError

    def run_for(
        self, call: Callable[[], Any], generates: bool, whole: Callable[[Layout], None] | None = None
    ) -> EngineRun:
        """A run of the engine that is not begun; `whole`: see `Requests`."""
        raise NotImplementedError

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        """Run requests to their ends, in the thread of a run: each call of the model is a step.

        Args:
            prompts: their token ids.
            params: the sampling parameters of each.

        Returns:
            The engine's `RequestOutput` of each prompt.
        """
        if not self._lock.acquire(blocking=False):
            self.check_free()
        self._prompts = prompts
        try:
            return self._run(prompts, params)
        finally:
            self._lock.release()

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def block_is_over(self, well: bool) -> None:
        """A block of one of its traces is; `well`: without an exception."""


class Engine(AnyEngine):
    """vLLM in this process.

    Args:
        model: what `vllm.LLM` loads, or one that is loaded.
        given: its arguments.

    Attributes:
        llm: the `vllm.LLM`.
        model: the model that it runs.
        runner: what prepares the model's batches.
    """

    def __init__(self, model: Any, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.vllm = vllm = import_vllm()
        if isinstance(model, vllm.LLM):
            self.llm = model
        else:
            arguments = engine_arguments(vllm, given)
            with _as_it_was(), _environment():
                try:
                    self.llm = vllm.LLM(model=str(model), **arguments)
                except (OSError, ValueError, RuntimeError, AssertionError, vllm.exceptions.VLLMError) as error:
                    raise LoadError(f"vLLM could not load {str(model)!r}: {_reason(error)}") from error
        check_settings(self.llm.llm_engine.vllm_config)
        self.runner: Any = _runner_of(self.llm)
        self.model: Module = self.runner.model
        self.sampler: Module = self.runner.sampler
        self.device = next(self.model.parameters()).device
        of_model, of_steps = self.config.model_config, self.config.scheduler_config
        self.hf_config, self.text_config = of_model.hf_config, of_model.hf_text_config
        self.max_model_len = int(of_model.max_model_len)
        self.step_tokens, self.step_requests = int(of_steps.max_num_batched_tokens), int(of_steps.max_num_seqs)
        self._names = count()
        self._index: dict[str, int] = {}

    @property
    def engine(self) -> Any:
        """The `vllm.LLMEngine`."""
        return self.llm.llm_engine

    @property
    def config(self) -> Any:
        """The `vllm.VllmConfig`."""
        return self.engine.vllm_config

    @property
    def shared_heads(self) -> int:
        """How many heads of keys and values the model has, in all processes."""
        return int(self.config.model_config.get_total_num_kv_heads())

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's weights and values."""
        return self.config.model_config.dtype

    def sampling(self, count: int, max_new_tokens: Any, params: Any, given: Mapping[str, Any]) -> list[Any]:
        made = sampling(self.vllm, count, max_new_tokens, params, given)
        texts = [name for name in ("stop", "bad_words") if any(getattr(one, name) for one in made)]
        if texts and self.config.model_config.skip_tokenizer_init:
            raise InputError(
                f"{texts[0]}: the engine has no tokenizer, by which it would know texts: give tokenizer=... when loading, or "
                "token ids: stop_token_ids=[...], logit_bias={id: -100.0}."
            )
        return made

    def run_for(
        self, call: Callable[[], Any], generates: bool, whole: Callable[[Layout], None] | None = None
    ) -> EngineRun:
        run = EngineRun(self.model, self.model, call, ThreadState())
        run.generates = generates
        run.replace(Requests(run, self.layout, whole))
        return run

    @property
    def is_busy(self) -> bool:
        return super().is_busy or self.engine.has_unfinished_requests()

    def layout(self) -> Layout:
        """The rows of the step that the model is called for now."""
        batch = self.runner.input_batch
        count = batch.num_reqs
        ends = self.runner.query_start_loc.np[: count + 1].tolist()
        lengths = [after - before for before, after in pairwise(ends)]
        requests = [self._index[name] for name in batch.req_ids[:count]]
        return Layout(requests, ends[:-1], lengths, batch.num_computed_tokens_cpu[:count].tolist())

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        run, engine = runs[get_ident()], self.engine
        index: dict[str, int] = {}
        outputs: dict[int, Any] = {}
        self._index = {}
        try:
            for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                name = f"nnatomy-{next(self._names)}"
                try:
                    self._index[engine.add_request(name, {"prompt_token_ids": list(prompt)}, one)] = i
                except (ValueError, TypeError, self.vllm.exceptions.VLLMError) as error:
                    raise InputError(
                        f"vLLM refuses prompt {i} with its sampling parameters: {_reason(error)}"
                    ) from error
                index[name] = i
            while engine.has_unfinished_requests():
                if self.model in run.progress.calls:
                    run.end_step()
                for output in engine.step():
                    if output.finished:
                        outputs[index[output.request_id]] = output
        finally:
            if left := [name for name, i in index.items() if i not in outputs]:
                engine.abort_request(left)
                self.runner.execute_model_state = None  # of a step that was left between its model and its sampler
        return [outputs[i] for i in range(len(prompts))]


class Generation(Module):
    """The outermost call of a run: all steps of the engine. It is no part of the model."""

    def __init__(self, engine: AnyEngine, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> None:
        super().__init__()
        self._work = (engine, prompts, params)

    def forward(self) -> list[Any]:
        engine, prompts, params = self._work
        return engine.run(prompts, params)


def _runner_of(llm: Any) -> Any:
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    worker = getattr(getattr(core, "model_executor", None), "driver_worker", None)
    runner = getattr(getattr(worker, "worker", None), "model_runner", None)
    if runner is None:
        raise LoadError(
            "This vllm.LLM runs its model in another process, where nothing can be read from here. Give the model's id, "
            "StandardizedTransformer(id, engine='vllm'), or make the LLM with VLLM_ENABLE_V1_MULTIPROCESSING=0 in the environment."
        )
    if not all(hasattr(runner, one) for one in ("input_batch", "query_start_loc", "model")):
        raise LoadError(
            f"The engine's {type(runner).__module__}.{type(runner).__name__} keeps its batch in another way than the one that is "
            "known here. docs/vllm.md lists the releases that are tested."
        )
    return runner


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _as_it_was() -> Iterator[None]:
    """The states of random generators, which an engine sets for the whole process, set back."""
    import numpy as np

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _reason(error: BaseException) -> str:
    """The innermost error's first line: the engine wraps what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().split("\n")
    if "validation error" in lines[0] and len(lines) > 2:  # a config's: then come the field and the reason
        reason = lines[2].strip()
        lines = [reason if "Value error, " in reason else f"{lines[1].strip()}: {reason}"]
    said = next((line for line in lines if "Value error, " in line), lines[0])
    return said.strip().removeprefix("Value error, ").split(" [type=")[0]
