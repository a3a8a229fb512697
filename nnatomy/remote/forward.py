"""The forward pass of a remote model, in the place of the forward of its skeleton's root.

The run of a trace (`nnatomy.core.run`) is the ordinary one: it calls the root, through its gate, in a thread of its own. The
root's forward is what is here: it has the server run the pass, to the first of the points that the run waits for, and
has the run look at the value there as if a module of its own had come to it. So blocks, collectors, steps,
edits, invocations and errors of order are what they are locally.

Where the user has put modes around the run or hooks on the skeleton, or has it train (none of which can be sent), or the run waits
for something that the server does not find, the skeleton's own forward runs here, and each function in it is a command.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from threading import get_ident
from typing import Any
from weakref import finalize

import torch
from torch._C import _functorch
from torch.nn import Module
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch as dispatch
from torch.utils import _pytree as pytree
from transformers import modeling_outputs
from transformers.utils.generic import ModelOutput

from nnatomy.core.cache import Cache
from nnatomy.core.gates import runs
from nnatomy.core.points import Axes, Slot
from nnatomy.core.taps import Taps
from nnatomy.errors import NotRemoteError, a
from nnatomy.methods.frozen_norms import FrozenNorms
from nnatomy.remote.caches import Caches
from nnatomy.remote.connection import Connection
from nnatomy.remote.tensor import sent, wrap
from nnatomy.remote.wire import decode
from nnatomy.standardized.accessors import _Collected
from nnatomy.standardized.keywords import PIXELS, SOUND
from nnatomy.standardized.pieces import Elsewhere

#: What a forward pass records for all layers would be recorded at the server, and not be edited.
RECORDS = ("output_hidden_states", "output_attentions", "output_router_logits")


#: What takes values and changes nothing.
_PASSIVE = (Cache, _Collected)


def _axes(told: dict[str, Any]) -> Axes | None:
    return None if told["axes"] is None else Axes(*map(tuple, told["axes"]))


def _is_sent(mode: Any) -> bool:
    """Whether a function mode is one of ours, which the server has too."""
    return type(mode) is FrozenNorms


class RemoteObject:
    """Something at the server that is no tensor: it can be handed on, and tells nothing."""

    def __init__(self, number: int, kind: str) -> None:
        self._number, self._kind = number, kind

    def __repr__(self) -> str:
        return f"<{a(self._kind)} at the server of a remote model>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotRemoteError(f".{name} of {a(self._kind)}: it is at the server of a remote model, and no tensor.")


class _NoTaps(Taps):
    """The taps are the server's."""

    def enter(self, run: Any) -> None:
        pass


class RemoteForward:
    """The forward of the skeleton's root.

    Args:
        root: the skeleton.
        kinds: the kinds of points that the server finds.
    """

    def __init__(self, root: Module, connection: Connection, kinds: set[str]) -> None:
        self._root, self._connection = root, connection
        self._own = root.forward
        self._names = list(inspect.signature(root.forward).parameters)
        self._modules = list(root.modules())
        self._numbers = {module: number for number, module in enumerate(self._modules)}
        self._kinds = {"input", "output", *kinds}
        self._caches = Caches(connection)
        #: Of what a pass records for all layers, what it does by the server's config.
        self._recorded = [name for name in RECORDS if self._records(name)]
        #: Whether each pass runs by commands (see above); and why none can, if so.
        self.by_commands = False
        self.no_commands = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = runs.get(get_ident())
        if self.by_commands or self.cannot_be_sent(run):
            return self._by_commands(run, *args, **kwargs)
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        by_config = [name for name in RECORDS if self._records(name) and name not in self._recorded]
        if recorded := [name for name in RECORDS if kwargs.get(name)] or by_config:
            raise NotRemoteError(
                f"{recorded[0]}=True of a remote model: read what you need by its name, such as model.layers_output[:] or "
                "model.attention_probabilities[:]."
            )
        if read := [name for name in sorted(PIXELS | SOUND) if kwargs.get(name) is not None]:
            raise NotRemoteError(
                f"{read[0]}=... of a remote model: a server runs forward passes of tokens, and of no images, videos or sound. Load "
                "the model here, StandardizedTransformer(id) without a server; or give inputs_embeds=..., what enters the stream."
            )
        number = self._connection.number()
        arguments = {key: self._sent(one) for key, one in kwargs.items() if one is not None}
        frozen = any(map(_is_sent, _get_current_function_mode_stack()))
        self._connection.command("open", number, arguments, *([frozen] if frozen else []))
        try:
            return self._follow(run, number, [0])
        except BaseException:
            if not self._connection.lost:
                self._connection.command("end", number)
            raise

    def _records(self, name: str) -> bool:
        return bool(getattr(self._root.config, name, False))

    def _by_commands(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """The skeleton's own forward."""
        before, self._connection.quiet = self._connection.quiet, 0 if run is None else get_ident()
        try:
            return self._own(*args, **kwargs)
        finally:
            self._connection.quiet = before

    def cannot_be_sent(self, run: Any) -> bool:
        """Whether the caller has put something around the pass that is in this process alone."""
        hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks or _functorch.peek_interpreter_stack() is not None:
            return True
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        if any(one.training or one._forward_hooks or one._forward_pre_hooks for one in self._modules):
            return True  # dropout, and hooks of the caller's
        if not all(map(_is_sent, _get_current_function_mode_stack())) or dispatch._get_current_dispatch_mode_stack():
            return True
        waiting = () if run is None else run.taps.waiting.values()
        unknown = [kind for taps in waiting for kind, _ in taps if not self._is_known(kind)]
        return bool(unknown) or torch._C._is_any_autocast_enabled()

    def _is_known(self, kind: str) -> bool:
        return kind in self._kinds or kind.startswith("source ")

    def _follow(self, run: Any, number: int, changes: list[int]) -> Any:
        """Go along with the pass, and have the run look wherever it waits.

        Args:
            changes: of all that is read in it: see `RemoteTensor`.
        """
        connection = self._connection
        if run is None:
            return self._received(self._go(number, ([], []), changes)["result"], changes)
        depth, taps, run.taps = len(run.progress.stack), run.taps, _NoTaps()
        run.watch()
        try:
            while True:
                told = self._go(number, self._watched(run), changes)
                for one in told["passed"]:
                    slot = Slot(*self._at(run, one), run.progress.step, self._received(one["value"], [0]), _axes(one))
                    for collector in tuple(run.collectors):
                        if isinstance(collector, _PASSIVE) and collector.takes(slot.module, slot.kind):
                            collector.take(slot)
                self._set_progress(run.progress, depth, told)
                if "result" in told:
                    return self._received(told["result"], changes)
                value = self._received(told["value"], changes)
                before = pytree.tree_leaves(value)
                slot = run.arrive(*self._at(run, told), value, _axes(told))
                if slot.skipped:
                    connection.command("skip", number, self._sent(slot.instead))
                elif [*map(id, pytree.tree_leaves(slot.value))] != [*map(id, before)]:
                    connection.command("assign", number, self._sent(slot.value))
        finally:
            run.taps = taps
            run.__dict__.pop("elsewhere", None)
            del run.progress.stack[depth:]

    def _at(self, run: Any, told: dict[str, Any]) -> tuple[Module, str, int]:
        """Module, kind and call of a point; the run knows what the pass there knows of it."""
        given = None if told["given"] is None else tuple(told["given"])
        run.elsewhere = Elsewhere(given, told["keys"])
        number, kind, call = told["at"]
        return self._modules[number], kind, call

    def _go(self, number: int, watched: tuple[list[Any], list[Any]], changes: list[int]) -> dict[str, Any]:
        changes[0] += 1  # the model may change in place what has been read
        told, _ = self._connection.ask("go", number, *watched)
        return told

    def _watched(self, run: Any) -> tuple[list[Any], list[Any]]:
        """Where the server is to stop, and where it is to copy the value in passing: [[module, kind], ...]."""
        wanted = [(question.module, question.kind) for question in run.questions]
        passing: list[tuple[Module, str]] = []
        copied = not torch.is_grad_enabled()  # no gradient goes through a copy
        for one in (*run.replacements, *run.collectors):
            points = passing if copied and isinstance(one, _PASSIVE) else wanted
            points += [(module, kind) for module in one.modules for kind in one.kinds]
        stops, copies = ({(self._numbers.get(one, 0), kind) for one, kind in points} for points in (wanted, passing))
        if unknown := next((kind for number, kind in stops | copies if number and not self._is_known(kind)), None):
            raise NotRemoteError(
                f"{unknown!r} inside of a module is found in this process alone, and not at the server."
            )
        stop, copy = ([[*point] for point in sorted(points) if point[0]] for points in (stops, copies - stops))
        return stop, copy

    def _set_progress(self, progress: Any, depth: int, told: dict[str, Any]) -> None:
        modules = self._modules
        progress.calls.update({modules[number]: count for number, count in told["calls"]})
        progress.stack[depth:] = [[modules[number], call, stage] for number, call, stage in told["stack"]]
        progress.found.update((modules[number], call, kind) for number, call, kind in told["found"])

    # Values.

    def _sent(self, value: Any) -> Any:
        return sent(self._connection, value, self._sent_other)

    def _sent_other(self, value: Any) -> Any:
        if isinstance(value, RemoteObject):
            return {"object": value._number}
        number = getattr(value, "_number_at_server", None)
        if number is not None and isinstance(value, ModelOutput):
            return {"output": [number, [[key, self._sent(one)] for key, one in value.items()]]}
        return self._caches.sent(value)

    def _received(self, told: Any, changes: list[int]) -> Any:
        return decode(told, partial(self._other, changes), torch.device("cpu"))

    def _other(self, changes: list[int], kind: str, of: Any) -> Any:
        if kind == "t":
            return wrap(self._connection, of, changes)
        if kind == "cache":
            return self._caches.received(of[0], self._received(of[1], changes))
        if kind == "output":
            return self._output(changes, *of)
        if kind == "object":
            finalize(found := RemoteObject(*of), self._connection.dead.append, of[0])
            return found
        raise NotRemoteError(f"The server has answered with a {kind!r}, which is nothing here.")

    def _output(self, changes: list[int], number: int, name: str, fields: list[Any]) -> Any:
        of_model = sys.modules[type(self._root).__module__]
        kind = getattr(modeling_outputs, name, getattr(of_model, name, None))
        if not (isinstance(kind, type) and issubclass(kind, ModelOutput)):
            raise NotRemoteError(f"The model returns {a(name)}, which only a local model can.")
        made = kind(**{key: self._received(one, changes) for key, one in fields})
        object.__setattr__(made, "_number_at_server", number)
        finalize(made, self._connection.dead.append, number)
        return made
