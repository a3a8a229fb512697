"""A model at a server, with the same names, traces and methods as one that is here."""

from __future__ import annotations

import os
from functools import update_wrapper
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import Module

from nnatomy.arch_configs import ArchConfig, Dimensions
from nnatomy.arch_configs.resolve import Anatomy
from nnatomy.errors import InputError, LoadError, NotRemoteError
from nnatomy.remote.connection import Connection
from nnatomy.remote.forward import RemoteForward
from nnatomy.remote.gradients import refuse_functions_of_the_users
from nnatomy.remote.methods import Server, reading_of, run_whole
from nnatomy.remote.skeleton import (
    anatomy_of,
    check_protocol,
    check_transformers,
    learn,
    report_of,
    skeleton_of,
    tokenizer_of,
)
from nnatomy.remote.tensor import RemoteTensor, fetch
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.accessors import LayerAccessor

#: The arguments of a local model that say nothing.
_DEFAULTS = {"processor": None, "arch_config": None, "validate": True, "allow_failures": False}
#: What one answer brings of the values of a block, in bytes.
_AT_ONCE = 64 << 20


def new_at_server(
    model: Any, tokenizer: Any, *, server: str | None = None, api_key: str | None = None, **others: Any
) -> Any:
    """What `StandardizedTransformer(model, server=...)` gives: by what the server says of what runs the model.

    A model on an engine is made; one on Transformers is to be initialised, with the connection that has been opened.
    """
    if any(name not in _DEFAULTS or one is not _DEFAULTS[name] for name, one in others.items()):
        raise InputError(
            "A remote model has been loaded and checked by its server: of the arguments there are the name, tokenizer, server "
            "and api_key."
        )
    address = server or os.environ.get("NNATOMY_SERVER", "")
    refuse_functions_of_the_users()
    connection = Connection(address, api_key or os.environ.get("NNATOMY_API_KEY"), str(model))
    try:
        told: dict[str, Any] = connection.ask("hello")[0]
        if told.get("name") != str(model):  # a server of one model alone, which is not asked for one
            raise LoadError(f"The server {address} has no model {str(model)!r}: it has {told.get('name')!r}.")
        check_protocol(told, address)
        if "engine" in told:
            from nnatomy.vllm.remote import RemoteVllmTransformer

            return RemoteVllmTransformer(connection, told, tokenizer)
    except BaseException:
        connection.close()
        raise
    remote = object.__new__(RemoteTransformer)
    remote.__dict__["_opened"] = connection, told
    return remote


class RemoteTransformer(StandardizedTransformer):
    """A `StandardizedTransformer` whose weights and computations are at a server: `StandardizedTransformer(name, server=...)`.

    Blocks are run here, line by line, as always; what they do to tensors is done at the server, and what their names hold at the
    end of the block is brought here. `docs/remote.md` says what costs a round trip, and what is not to be had.

    Args:
        model: the name by which the server has it.
        tokenizer: one to take in the place of the server's.
        server, api_key: see `StandardizedTransformer`.

    Attributes:
        server: what runs methods whole, and tells its status: see `nnatomy.remote.methods.Server`.
        whole_methods: whether a method of `nnatomy.methods` whose arguments are data runs whole at the server, by itself: one
            round trip. Set it to False to have each of its passes run from here.

    Raises:
        ConnectionLostError: if there is no server, or it asks for another key.
        LoadError: if it has no such model, or another release.
        InputError: for arguments that are for the server to say.
    """

    _opened: tuple[Connection, dict[str, Any]]

    def __init__(
        self,
        model: str | Path | Module,
        tokenizer: Any = None,
        *,
        arch_config: ArchConfig | None = None,
        validate: bool | Literal["shapes"] = True,
        allow_failures: bool = False,
        server: str | None = None,
        api_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        del server, api_key, arch_config, validate, allow_failures, kwargs  # `new_at_server` has looked at them
        self._connection = connection = self._opened[0]
        self._told: dict[str, Any] = self._opened[1]
        try:
            check_transformers(self._told, connection.server)
            skeleton: Any = skeleton_of(self._told, connection)
            kinds = {fact["kind"] for fact in self._told["accessors"].values()}
            self._forward_there = there = RemoteForward(skeleton, connection, kinds)

            def forward(*args: Any, **kwargs: Any) -> Any:
                return there(*args, **kwargs)

            skeleton.forward = update_wrapper(forward, skeleton.forward)
            super().__init__(skeleton, tokenizer_of(self._told["tokenizer"]) if tokenizer is None else tokenizer)
            self.server = Server(connection.server, connection.key, str(model), connection=connection)
            self.whole_methods = bool(self._told.get("whole_methods", True))
            #: How texts are read at the server; nothing equals it where the tokenizer is another one.
            self._reading = reading_of(self.tokenizer) if tokenizer is None else object()
            self._generation = _settings(skeleton)
        except BaseException:
            connection.close()
            raise

    def _resolve(self, causal: Module, arch_config: ArchConfig | None) -> Anatomy:  # noqa: ARG002
        return anatomy_of(self._told["anatomy"], causal)

    def _check_names(self, causal: Any, *_: Any) -> None:
        self._mixers.found = {}
        self._sums.layers = {}  # what is inside of the layers has been found there
        super()._check_names(causal, False, False)
        self.dimensions = Dimensions(**self._told["dimensions"])
        learn(
            self._told,
            self,
            {name: one for name, one in vars(self).items() if isinstance(one, LayerAccessor)},
        )
        self.validation = report_of(self._told["report"])
        self._find_inside()

    def _find_inside(self) -> None:
        """What is shown inside of layers, where a pass runs by commands: the names in it are then found here."""
        assert self._blocks.example is not None
        finder, there = self._sums.finder(), self._forward_there
        there.by_commands = True
        try:
            with self._blocks.example(self._blocks) as tracer:
                tracer.block.run.collect(finder)
                tracer.result  # noqa: B018
            self._connection.ask("sync")  # what has failed is told at a question
            self._sums.layers = finder.found
        except Exception as error:  # noqa: BLE001 - told to whoever wants to run by commands
            there.no_commands = str(error)
            self._connection.command("clear")
        finally:
            there.by_commands = False
            for sums in finder.found.values():
                sums.values.clear()

    @property
    def by_commands(self) -> bool:
        """Whether each function in a forward pass is sent as a command, rather than asking for each value at its point.

        A block that decides nothing by values is then one round trip, however much it reads; the pass itself takes longer.
        """
        return self._forward_there.by_commands

    @by_commands.setter
    def by_commands(self, on: bool) -> None:
        if on and self._forward_there.no_commands:
            raise NotRemoteError(f"This model cannot be run by commands: {self._forward_there.no_commands}")
        self._forward_there.by_commands = on

    def run_whole(self, method: str, given: dict[str, Any]) -> tuple[Any] | None:
        """Have a method run whole at the server, if what is here makes no difference: what it gives; None if it has not run."""
        if not self.whole_methods or self._connection.lost or self.edits or self._blocks.is_open_here:
            return None
        there = self._forward_there
        if (
            there.cannot_be_sent(None)
            or torch.is_inference_mode_enabled()
            or torch.get_default_dtype() != torch.float32
        ):
            return None
        if reading_of(self.tokenizer) != self._reading or _settings(self.hf_model) != self._generation:
            return None
        return run_whole(self.server, method, given, self)

    def scan(self, *args: Any, early_stop: bool = True, **kwargs: Any) -> Any:  # noqa: ARG002
        """Is not to be had. Raises NotRemoteError."""
        raise NotRemoteError(
            "scan of a remote model: trace it. The shapes of what you read are known here, without a value."
        )

    def _block_is_over(self, well: bool) -> None:
        """Have here what the block's names hold."""
        bring(self._connection, well)

    def server_status(self) -> dict[str, Any]:
        """What the server tells of itself: versions, its model with the hash of its weights and its validation, sessions."""
        return self.server.status()

    def close(self) -> None:
        """End the session at the server; what has been fetched stays."""
        self._connection.close()
        self.server.close()


def _settings(model: Any) -> tuple[Any, ...]:
    """What of a model's configuration says how it runs, and can be changed here."""
    generation = getattr(model, "generation_config", None)
    return model.config._attn_implementation, None if generation is None else generation.to_dict()


def bring(connection: Connection, well: bool) -> None:
    """At the end of a block, have here what its names hold; what has failed at the server is told now.

    Args:
        well: whether it has ended without an exception.
    """
    if connection.lost:
        return
    if not well:
        connection.command("clear")
        return
    held = [tensor for one in list(connection.live.values()) if (tensor := one()) is not None]
    wanted = [one for one in held if one.here is None and _size(one) <= _AT_ONCE]
    while wanted or connection.unanswered:
        now: list[RemoteTensor] = []
        while wanted and sum(map(_size, now)) + _size(wanted[-1]) <= _AT_ONCE:
            now.append(wanted.pop())
        fetch(connection, now, leave_out=True)


def _size(tensor: RemoteTensor) -> int:
    return tensor.numel() * tensor.element_size()
