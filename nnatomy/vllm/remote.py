"""A model on an engine at a server: what `StandardizedTransformer(id, server=...)` gives where `nnatomy serve --engine vllm` runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from torch.nn import Module

from nnatomy.errors import NoSuchModuleError, NotRemoteError
from nnatomy.names import OF_LAYERS, ROWS
from nnatomy.remote.connection import Connection
from nnatomy.remote.methods import Server
from nnatomy.remote.skeleton import report_of, tokenizer_of
from nnatomy.tracing import ModuleView
from nnatomy.tracing.attach import Point
from nnatomy.vllm.accessors import Accessor
from nnatomy.vllm.anatomy import Anatomy, Layer
from nnatomy.vllm.places import Place
from nnatomy.vllm.there import EngineThere, PlaceThere
from nnatomy.vllm.transformer import VllmTransformer


class ViewThere(ModuleView):
    """A module of the engine's model at a server: its values are read and assigned as elsewhere."""

    __slots__ = ()

    def skip(self, value: Any) -> NoReturn:
        """Raise NotRemoteError."""
        del value
        raise NotRemoteError(
            f"{self.path}.skip(...): the server of an engine runs all modules. Assign what this one gives: {self.path}.output = ..."
        )

    def _module_view(self, module: Module, path: str, call: int = 0) -> ModuleView:
        return ViewThere(self._blocks, module, path, call)

    def _no_such(self, name: str) -> NoSuchModuleError:
        return NoSuchModuleError(f"{super()._no_such(name)} (Weights and settings of modules are at the server.)")


class RemoteVllmTransformer(VllmTransformer):
    """A `VllmTransformer` whose engine is at a server. Blocks run here, as those of all remote models: see docs/remote.md.

    Args:
        connection: to the server.
        told: what it has told of the model.
        tokenizer: one to take in the place of the server's.

    Attributes:
        server: tells the server's status.
        process: the server's process, if it is one of this model's own.
    """

    engine: Any
    process: Any = None

    def __init__(self, connection: Connection, told: Mapping[str, Any], tokenizer: Any = None) -> None:
        engine = EngineThere(connection, told)
        found = tokenizer_of(told["tokenizer"]) if tokenizer is None else tokenizer
        self._load(engine, told["name"], found, "the server has none for it: give tokenizer=..., or token ids.")
        self._told, self._refused = told, dict(told["refused"])
        self._anatomy = Anatomy(
            [Layer(engine.modules[number], None, None, None, None, {}) for number in told["layers"]], None, None, None
        )
        for name in OF_LAYERS:
            places = [self._place_there(one, name, i) for i, one in enumerate(told["places"][name])]
            setattr(self, name, Accessor(ROWS[name], places, self._blocks))
        self.validation = report_of(told["report"])
        self.server = Server(connection.server, connection.key, told["name"], connection=connection)

    def _place_there(self, told: Any, name: str, layer: int | None) -> Place | str:
        if isinstance(told, str):
            return told
        number, kind, only_read, of_step = told
        return PlaceThere(self.engine.modules[number], kind, only_read, self.engine, name, layer, of_step)

    def place(self, name: str, generates: bool) -> Place:
        self._check(name)
        told = self._told["of_steps"][f"{name}{' of a generation' * generates}"]
        found = self._place_there(told, name, None)
        assert isinstance(found, Place)
        return found

    def _logits_of(self, hidden_state: Tensor) -> Tensor:
        found: Tensor = self.engine.project(hidden_state)
        return found

    def _module_view(self, module: Module, path: str, call: int = 0) -> ModuleView:
        return ViewThere(self._blocks, module, path, call)

    def _point(self, point: str | ModuleView) -> Point:
        raise NotRemoteError(
            f"attach({point!r:.80}, ...): a module is called in the engine's own process, and this one's is at a server. Give an "
            "edit, which runs here: model.edit(function)."
        )

    def server_status(self) -> dict[str, Any]:
        """What the server tells of itself: versions, its model with the hash of its weights and its validation, sessions."""
        return self.server.status()

    def close(self) -> None:
        """End the session at the server, and the server if it is this model's own; what has been fetched stays."""
        self.engine.connection.close()
        self.server.close()
        if self.process is not None:
            self.process.stop()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, at {self.engine.connection.server}>"
