"""An engine at a server, in the place of one in this process: it runs a trace to the points that the trace's blocks wait for.

The run of a trace is the ordinary one (`EngineRun`), with its blocks, steps, edits and errors. Its call is what is here: it has the
server go on, and has the run look at what is there as if the engine had come to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree
from transformers import AutoConfig

from nnatomy.core.gates import runs
from nnatomy.core.points import Slot, versions
from nnatomy.core.thread_state import ThreadState
from nnatomy.errors import AssignmentError, LoadError, NotRemoteError, a_kind
from nnatomy.names import OF_LAYERS
from nnatomy.remote.connection import Connection
from nnatomy.remote.model import bring
from nnatomy.remote.tensor import sent, wrap
from nnatomy.remote.wire import decode
from nnatomy.vllm.attention import LATER
from nnatomy.vllm.engine import AnyEngine
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.outputs import RequestOutput, from_bytes
from nnatomy.vllm.places import Place
from nnatomy.vllm.run import EngineRun

_OF_LAYER = re.compile(r"(\w+)\[(-?\d+)\]")


class EngineThere(AnyEngine):
    """The engine. Its modules are empty: names and classes alone."""

    def __init__(self, connection: Connection, told: Mapping[str, Any]) -> None:
        super().__init__()
        self.connection = connection
        self.device = torch.device("cpu")  # as remote tensors say
        self.model = _tree(told["modules"])
        self.sampler: Module = _AtServer()
        self.modules = [*self.model.modules(), self.sampler]
        try:
            self.hf_config = AutoConfig.for_model(**json.loads(told["config"]))
        except (ValueError, KeyError) as error:
            raise LoadError(f"The server's model is of a kind that Transformers does not know here: {error}") from error
        self.text_config: Any = self.hf_config.get_text_config()
        for name, one in told["limits"].items():
            setattr(self, name, one)
        self._numbers = {module: number for number, module in enumerate(self.modules)}
        self._layers = len(told["layers"])
        self._number = 0
        self._ready: dict[tuple[str, Any], Tensor] = {}

    def sampling(self, count: int, max_new_tokens: Any, params: Any, given: Mapping[str, Any]) -> list[Any]:
        # What the server makes them of, which looks at them now, where there is more to look at than a number of tokens.
        asked = [max_new_tokens, params, dict(given)]
        if params is not None or given or type(max_new_tokens) is not int or max_new_tokens < 1:
            self.connection.ask("sampling", count, self._sampling(asked))
        return asked

    def _sampling(self, asked: Sequence[Any]) -> Any:
        def refuse(value: Any) -> NoReturn:
            raise NotRemoteError(
                f"A {type(value).__name__} in sampling parameters of an engine at a server: give sampling_params=dict(...) of the "
                "fields of vllm.SamplingParams that are numbers, texts and lists of these."
            )

        return sent(self.connection, asked, refuse)

    def run_for(
        self, call: Callable[[], Any], generates: bool, whole: Callable[[Layout], None] | None = None
    ) -> EngineRun:
        del whole  # the server looks whether all prompts are in one step
        run = EngineRun(self.model, self.model, call, ThreadState())
        run.generates = generates
        return run

    def block_is_over(self, well: bool) -> None:
        bring(self.connection, well)

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        connection, run = self.connection, runs[get_ident()]
        self._number = connection.number()
        ids = torch.tensor([*chain(*prompts)], dtype=torch.int32)
        asked = [len(one) for one in prompts], self._sampling(params), run.generates
        connection.ask("open", self._number, *asked, blobs=[ids.numpy().tobytes()])
        with self._ended():
            return self._follow(run, len(run.progress.stack))

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """After it, the engine is free for others."""
        try:
            yield
        finally:
            self._ready = {}
            if not self.connection.lost:
                self.connection.command("end", self._number)
                self.connection.send()

    def _follow(self, run: EngineRun, depth: int) -> list[RequestOutput]:
        while True:
            told, blobs = self.connection.ask("go", self._number, self._watched(run))
            while run.progress.step < told["step"]:
                run.end_step()
            self._note(run, depth, told)
            if "result" in told:
                return from_bytes(bytes(blobs[0]))
            value = self._received(told["value"])
            self._ready = {(name, layer): self._received(one) for name, layer, one in told["read"]}
            leaves = pytree.tree_leaves(value)
            before = [*map(id, leaves)], versions(leaves)
            number, kind, call = told["at"]
            slot = run.arrive(self.modules[number], kind, call, value)
            self._ready = {}
            new = pytree.tree_leaves(slot.value)
            if ([*map(id, new)], versions(new)) != before:
                self._check_shapes(slot, leaves, new)
                self.connection.command("assign", self._number, self._sent(slot.value))

    def _check_shapes(self, slot: Slot, old: list[Any], new: list[Any]) -> None:
        """Raise AssignmentError for a point's whole value that is another one: the engine's kernels do not look at shapes."""
        shapes = [[tuple(one.shape) for one in leaves if isinstance(one, Tensor)] for leaves in (new, old)]
        if shapes[0] != shapes[1]:
            path = next(path for path, one in self.model.named_modules() if one is slot.module)
            raise AssignmentError(
                f"{path}.{slot.kind}: it has tensors of the shapes {shapes[1]}, and ones of {shapes[0]} were assigned."
            )

    def _watched(self, run: EngineRun) -> list[list[Any]]:
        """Where the server is to stop: [[module, kind, from which step on, name, layer], ...]."""
        points = [(one.module, one.kind, one.step, *self._named(one.name)) for one in run.questions]
        points += [
            (module, kind, 0, None, None)
            for one in (*run.replacements, *run.collectors)
            for module in one.modules
            for kind in one.kinds
        ]
        for module, kind, *_ in points:
            if kind not in ("input", "output") or module not in self._numbers:
                raise NotRemoteError(
                    f"{kind!r} of {a_kind(module)}: of an engine at a server there are inputs and outputs of its modules. "
                    "Read by a standard name, or load the engine in this process."
                )
        return [[self._numbers[module], *rest] for module, *rest in points]

    def _named(self, asked: str) -> tuple[Any, Any]:
        """The name and layer of a question, so that the value comes with the answer."""
        if (found := _OF_LAYER.fullmatch(asked)) and found[1] in OF_LAYERS:
            return found[1], int(found[2]) % self._layers
        return (asked, None) if asked in ("logits", "token_embeddings", "sampled_tokens") else (None, None)

    def _note(self, run: EngineRun, depth: int, told: dict[str, Any]) -> None:
        """The run knows what is known there."""
        modules, progress = self.modules, run.progress
        if "layout" in told:
            run.layout = Layout(*told["layout"])
        if "ids" in told:
            ids = self._received(told["ids"])
            run.inputs = (), {} if ids is None else {"input_ids": ids}
        progress.calls.update({modules[number]: count for number, count in told["calls"]})
        progress.stack[depth:] = [[modules[number], call, stage] for number, call, stage in told["stack"]]

    # Values.

    def read(self, name: str, layer: Any) -> Tensor:
        """The value of a name where the trace stands."""
        if (found := self._ready.pop((name, layer), None)) is not None:
            return found
        value: Tensor = self._received(self.connection.ask("read", self._number, name, layer)[0])
        return value

    def write(self, name: str, layer: Any, new: Tensor) -> None:
        """Put another one in its place."""
        self._ready = {}
        self.connection.command("write", self._number, name, layer, self._sent(new))

    def project(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states."""
        found: Tensor = self._received(self.connection.ask("project", self._sent(hidden))[0])
        return found

    def _sent(self, value: Any) -> Any:
        return sent(self.connection, value, _sent_other)

    def _received(self, told: Any) -> Any:
        def other(kind: str, of: Any) -> Any:
            return wrap(self.connection, of) if kind == "t" else ObjectThere(*of)

        return decode(told, other, torch.device("cpu"))


class ObjectThere:
    """Something at the server that is no tensor: it can be put back, and tells nothing."""

    def __init__(self, number: int, kind: str) -> None:
        self.number, self.kind = number, kind

    def __repr__(self) -> str:
        return f"<a {self.kind} at the server of an engine>"


def _sent_other(value: Any) -> Any:
    if isinstance(value, ObjectThere):
        return {"object": value.number}
    raise NotRemoteError(f"A {type(value).__name__} cannot be sent to the server of an engine.")


class _AtServer(Module):
    """A module of the engine's model: its name alone."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotRemoteError."""
        raise NotRemoteError(
            f"A {type(self).__name__} of an engine at a server is not called from here: its weights are there. "
            "model.project_on_vocab gives logits of hidden states."
        )


def _tree(told: list[list[str]]) -> Module:
    """Modules of those classes at those paths, the whole first."""
    made: dict[str, Module] = {}
    for path, kind in told:
        made[path] = type(kind, (_AtServer,), {})()
        if path:
            parent, _, name = path.rpartition(".")
            made[parent].add_module(name, made[path])
    return made[""]


@dataclass(frozen=True)
class PlaceThere(Place):
    """Where a name is on a layer, at the server.

    Attributes:
        layer: None for a name of a step.
        of_step: whether what is of earlier steps is only read.
    """

    engine: Any = None
    name: str = ""
    layer: int | None = None
    of_step: bool = False

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        del slot, layout
        found: Tensor = self.engine.read(self.name, self.layer)
        return found

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> None:
        del slot
        if self.of_step and any(layout.before):
            raise AssignmentError(f"{self.name}: {LATER}.")
        self.engine.write(self.name, self.layer, new)
