"""Single traces of a local model that a server runs: `model.trace(prompts, remote=True)`.

The trace is the ordinary one. At its root, after the blocks have seen what goes in, the server runs the forward pass instead (see
`RemoteForward`), and what it gives is the root's output. The model's own weights are then the server's: it has the same.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch.nn import Module

from nnatomy.core import Collector, Slot
from nnatomy.core.progress import INSIDE
from nnatomy.core.run import Run
from nnatomy.errors import InputError, NotRemoteError, a
from nnatomy.remote.connection import Connection
from nnatomy.remote.forward import RECORDS, RemoteForward
from nnatomy.remote.gradients import refuse_functions_of_the_users
from nnatomy.remote.model import bring
from nnatomy.remote.skeleton import check_protocol, check_transformers
from nnatomy.remote.tensor import RemoteTensor
from nnatomy.remote.wire import DTYPES


def sender_of(model: Any, name: str | None = None) -> Sender:
    """The sender of a local model, which its traces share.

    Args:
        name: what the server calls the model. By default the name that it was loaded by, if any; and where the server has one model
            alone, that.

    Raises:
        InputError: if no server is set, or the model is not on the CPU.
        ConnectionLostError: if there is no server, or it asks for another key.
        NotRemoteError: if what it has is not this model.
    """
    if hasattr(model, "server_status"):
        raise InputError("remote=True: this model is a server's already. Leave it out.")
    server = model.server or os.environ.get("NNATOMY_SERVER")
    if not server:
        raise InputError(
            "remote=True needs a server: set model.server = 'http://HOST:PORT' (and model.api_key, if it asks for one), or "
            "NNATOMY_SERVER (and NNATOMY_API_KEY) in the environment. `nnatomy serve MODEL` starts one."
        )
    if model.device.type != "cpu":
        raise InputError(
            f"remote=True: the model is on {model.device}, and what a server sends stands for tensors on the CPU."
        )
    key = model.api_key or os.environ.get("NNATOMY_API_KEY")
    known = model._sender
    if known is None or known.asked != (server, key, name) or known.connection.lost:
        known = model._sender = Sender(model, server, key, name)
    known.check()
    return known


class Sender:
    """A local model's session at a server.

    Attributes:
        asked: address, key and name that it was made of.
    """

    def __init__(self, model: Any, server: str, key: str | None, name: str | None) -> None:
        self.asked = server, key, name
        refuse_functions_of_the_users()
        self._root: Module = model.steps_of
        self._checked: Any = None
        self.connection = Connection(server, key, name or model._name)
        try:
            self._told: dict[str, Any] = self.connection.ask("hello")[0]
            check_protocol(self._told, server)
            if "engine" in self._told:
                raise NotRemoteError(
                    f"remote=True: {server} runs {self._told['name']!r} on an engine, {self._told['engine']}, whose modules are not "
                    f"those of this model. Take the one that is there: StandardizedTransformer({self._told['name']!r}, server=...)."
                )
            check_transformers(self._told, server)
            self._check_same(model.hf_model)
        except BaseException:
            self.connection.close()
            raise
        self._forward = _Sent(self._root, self.connection, {one["kind"] for one in self._told["accessors"].values()})
        its = json.loads(self._told["config"])
        self._forward._recorded = [name for name in RECORDS if its.get(name)]

    def _check_same(self, hf_model: Module) -> None:
        there = [(name, shape, dtype) for name, shape, _, dtype, *_ in self._told["tensors"]]
        mine = {
            **dict(hf_model.named_parameters(remove_duplicate=False)),
            **dict(hf_model.named_buffers(remove_duplicate=False)),
        }
        here = [(name, list(one.shape), str(one.dtype).removeprefix("torch.")) for name, one in mine.items()]
        if type(hf_model).__name__ != self._told["class"] or here != there:
            different = next((f": {a} here, {b} there" for a, b in zip(here, there, strict=False) if a != b), "")
            raise NotRemoteError(
                f"The server {self.connection.server} has {a(self._told['class'])} under the name {self._told['name']!r}, which is "
                f"not this {type(hf_model).__name__}{different}. Say which of its models is: remote='NAME'."
            )
        for i, (one, (_, shape, strides, dtype, needs, _)) in enumerate(
            zip(mine.values(), self._told["tensors"], strict=True)
        ):
            meta = torch.empty_strided(shape, strides, dtype=DTYPES[dtype], device="meta")
            self.connection.weights.setdefault(id(one), RemoteTensor(meta, self.connection, -i - 1, needs))
        self._mine = mine

    def check(self) -> None:
        """Raise NotRemoteError if the weights are not those of the server."""
        state = [(id(one), one._version) for one in self._mine.values()]
        if state == self._checked:
            return
        from nnatomy.serve.hello import weights_hash
        from nnatomy.serve.tensors import Weights

        mine, its = weights_hash(Weights(self._root)), self._told["hash"]
        if mine != its:
            raise NotRemoteError(
                f"The weights of this model are not those of {self._told['name']!r} at {self.connection.server}: their SHA-256 is "
                f"{mine} here, and {its} there."
            )
        self._checked = state

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has a session of its own."""

    def passes(self, run: Run) -> Collector:
        """What has the server run the forward passes of a run."""
        return _Passes(run, self._root, self._forward)

    def _block_is_over(self, well: bool) -> None:
        bring(self.connection, well)


class _Passes(Collector):
    """At the root's input, after everybody else: the root is not run, and its output is the server's."""

    def __init__(self, run: Run, root: Module, forward: RemoteForward) -> None:
        self.modules, self.kinds = {root}, {"input": None}
        self._run, self._forward = run, forward

    def take(self, slot: Slot) -> None:
        args, kwargs = slot.value
        self._run.progress.stack[-1][2] = INSIDE
        slot.skip(self._forward(*args, **kwargs))


class _Sent(RemoteForward):
    def _by_commands(self, run: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        raise NotRemoteError(
            "This trace cannot be sent: there are modes, transforms or hooks on saved tensors around it, hooks on the model's "
            "modules or some that train, or it waits for what is found in this process alone. Trace it without remote=True."
        )
