"""An engine's model that is split over processes and served: rank 0 talks to the clients, and the others do what it does."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from nnatomy.parallel.ranks import Ranks
from nnatomy.parallel.served import Led, SplitServed
from nnatomy.serve.limits import Limits
from nnatomy.serve.session import Session
from nnatomy.vllm.served import EngineServed
from nnatomy.vllm.session import EngineSession
from nnatomy.vllm.split import ranks


class EngineRanks(Ranks):
    """The processes of an engine. What fails on one of them alone ends that process, and with it the server."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.members = tuple(range(self.size))
        self._count, self._broken = 0, ""

    def break_off(self, why: str) -> None:
        self._broken = self._broken or why


class LedEngineSession(Led, EngineSession):
    """What one client has at it."""


class SplitEngineServed(SplitServed, EngineServed):
    """An engine on several ranks. It is made on all of them at the same time."""

    session: type[Session] = LedEngineSession

    def _ranks_of(self, _: Any) -> Ranks:
        found = self._points.ranks = EngineRanks()
        return found


def engine_served(name: str, model: Any, limits: Limits) -> EngineServed:
    """An engine that is served, on one process or several."""
    return (EngineServed if ranks() == 1 else SplitEngineServed)(name, model, limits)
