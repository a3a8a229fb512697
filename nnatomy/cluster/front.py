"""What stands in front of the models of a cluster: it has none, and tells where they are and what their replicas tell."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from nnatomy.serve.app import Denied, Server
from nnatomy.serve.hello import versions
from nnatomy.serve.keys import Keys

#: How long replicas may take to tell, in seconds; one that computes tells all the same.
_TELL, _HASH = 10.0, 600.0
#: What is the sum of its replicas, of a model.
_SUMS = ("sessions", "waiting", "frames", "seconds", "held_bytes")


class Front(Server):
    """Sends clients to the address of their model, and gathers what all replicas tell.

    Args:
        routes: the path of each model's addresses, by its name.
        handle: of an application of Ray Serve, by its name.
    """

    def __init__(self, routes: Mapping[str, str], handle: Callable[[str], Any], keys: Keys | None = None) -> None:
        self.models, self.replica = {}, ""
        self._routes, self._handle = dict(routes), handle
        self._lets_in(keys)

    async def _session(self, socket: WebSocket) -> None:
        try:
            self._client_of(socket)
            path = self._named(self._routes, socket.query_params.get("model"))
        except Denied as error:
            self.refused[error.kind] += 1
            await self._answer(socket, error.response())
            return
        text = f"this model has the address {path} of this server: have a later release of websockets, or give it"
        where = {"Location": f"{path}/v1/session?{socket.url.query}"}
        await self._answer(socket, JSONResponse({"error": text}, 307, where))

    async def told(self, admin: bool, hashes: bool = False) -> dict[str, Any]:
        """See `Server`: of a model the sums of its replicas, each of which is named."""
        seconds = _HASH if hashes else _TELL
        found = await asyncio.gather(
            *(self._all(path, seconds, "told", admin, hashes) for path in self._routes.values())
        )
        models = [together([told["models"][0] for told in each], each) for each in found if each]
        replicas = [one for each in found for one in each]
        told: dict[str, Any] = {
            "versions": versions(),
            "models": models,
            "addresses": self._routes,
            "sessions": sum(one["sessions"] for one in models),
            "waiting": sum(one["waiting"] for one in models),
            "runs": _added([one["runs"] for one in models] or [{"running": 0, "kept": 0, "bytes": 0}]),
            "refused": _added([dict(self.refused), *(one["refused"] for one in replicas)]),
        }
        if admin:
            told["open"] = [{**row, "replica": one["replica"]} for one in replicas for row in one["open"]]
        return told

    async def _end(self, request: Request, number: int) -> bool:
        """A session's number is its replica's: `?replica=`."""
        replica = request.query_params.get("replica", "")
        if not replica:
            raise Denied(
                "session", 404, f"say of which replica session {number} is: ?replica=NAME, as the status tells"
            )
        for path in self._routes.values():
            if True in await self._all(path, _TELL, "end", replica, number):
                return True
        return False

    async def _all(self, path: str, seconds: float, name: str, *args: Any) -> list[Any]:
        """What all replicas of a model give that still live."""
        asked = self._handle(path[1:]).broadcast(name, *args)
        try:
            found = await asked.results_async(timeout_s=seconds, return_exceptions=True)
        except TimeoutError:
            return []
        return [one for one in found if not isinstance(one, BaseException)]


def together(models: list[dict[str, Any]], told: list[dict[str, Any]]) -> dict[str, Any]:
    """One model, of what its replicas tell of it."""
    one = {**models[0], "replicas": sorted(each["replica"] for each in told)}
    for name in _SUMS:
        one[name] = round(sum(each[name] for each in models), 3)
    one["runs"] = _added([each["runs"] for each in models])
    if "hash_now" in one:  # one that is not what was loaded is the one to be told
        one["hash_now"] = next((each["hash_now"] for each in models if each["hash_now"] != each["hash"]), one["hash"])
    return one


def _added(each: list[dict[str, Any]]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for one in each:
        counts.update(one)
    return dict(counts)
