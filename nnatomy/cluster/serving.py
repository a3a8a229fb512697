"""The builders of Ray Serve's applications: one for each model, and one in front of all.

A replica of a model is the application of `nnatomy.serve.app`, in a process of Ray's. A session is one WebSocket, which Ray keeps at
one replica. What is asked for later, the result of a run, is found by the name of the run, whose first digits are those of its
replica: they are what Ray's model multiplexing goes by.
"""

from __future__ import annotations

import secrets
from argparse import Namespace
from dataclasses import replace
from typing import Any

from nnatomy.cluster.config import check
from nnatomy.cluster.package import load_serve

#: How many digits of a run's name are its replica's.
DIGITS = 8


def model(args: dict[str, Any]) -> Any:
    """The application of one model: the builder that a config file names.

    Args:
        args: `model`, its name; `load`, how it is loaded; `limits`, `host` and `key_file`.

    Raises:
        InputError: for an address that others can reach, where no key is asked for.
    """
    return model_deployment(args).bind(args)


def model_deployment(args: dict[str, Any]) -> Any:
    """The same, whose options can be changed still."""
    serve = load_serve()
    check(args["host"], args.get("key_file"))

    class Model:
        """A replica."""

        def __init__(self, args: dict[str, Any]) -> None:
            self.name = secrets.token_hex(DIGITS // 2)
            self.server = _server(args, self.name)

        async def __serve_build_asgi_app__(self) -> Any:
            await self.holds(self.name)
            return self.server.application

        @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
        async def holds(self, name: str) -> str:
            """Has Ray send here what is for this replica."""
            return name

        async def told(self, admin: bool, hashes: bool) -> dict[str, Any]:
            """What the status tells of it."""
            return await self.server.told(admin, hashes)

        async def end(self, replica: str, number: int) -> bool:
            """Have a session end, if it is here."""
            return replica == self.name and self.server.end(number)

    return serve.deployment(name="Model")(serve.ingress()(Model))


def _server(args: dict[str, Any], name: str) -> Any:
    from nnatomy.cli.load import load
    from nnatomy.serve.app import Server
    from nnatomy.serve.limits import Limits

    how = {
        **dict.fromkeys(("dtype", "device", "device_map", "offload_folder", "trust_remote_code")),
        **args.get("load", {}),
    }
    found = load(Namespace(model=args["model"], **how))
    limits = replace(Limits(), **args.get("limits", {}))
    return Server({args["model"]: found}, check(args["host"], args.get("key_file")), limits, replica=name)


def front(args: dict[str, Any]) -> Any:
    """The application at `/`: it tells clients where their model is, and what all replicas tell.

    Args:
        args: `models`, the path of each by its name; `host` and `key_file`.
    """
    return front_deployment(args).bind(args)


def front_deployment(args: dict[str, Any]) -> Any:
    """The same, whose options can be changed still."""
    serve = load_serve()
    check(args["host"], args.get("key_file"))

    class Front:
        """It has no model."""

        def __init__(self, args: dict[str, Any]) -> None:
            self._args = args

        async def __serve_build_asgi_app__(self) -> Any:
            from nnatomy.cluster.front import Front as Application

            keys = check(self._args["host"], self._args.get("key_file"))
            return Application(self._args["models"], serve.get_app_handle, keys).application

    options = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1000}
    return serve.deployment(name="Front", **options)(serve.ingress()(Front))
