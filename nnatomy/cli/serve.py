"""`nnatomy serve`: a server of models, for clients elsewhere."""

from __future__ import annotations

import argparse
import sys
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nnatomy.errors import InputError

#: What can be set of what one session may use: see `nnatomy.serve.limits`.
_LIMITS = (
    "held_bytes",
    "graph_bytes",
    "tokens",
    "total_tokens",
    "operations",
    "total_operations",
    "compute_seconds",
    "command_seconds",
    "idle_seconds",
    "total_seconds",
    "send_seconds",
    "sessions",
    "waiting",
    "runs",
    "kept_bytes",
    "kept_seconds",
)


def add_serve(commands: Any, loading: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    what = "hold models for clients elsewhere: StandardizedTransformer(ID, server='http://HOST:PORT')"
    parser = commands.add_parser("serve", help=what, description=f"{what[0].upper()}{what[1:]}.", parents=[loading])
    parser.add_argument("others", nargs="*", metavar="MODEL", help="more models, each under its own name")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1); others need keys")
    parser.add_argument("--port", type=int, default=8765, help="(8765); 0 for any that is free")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="let in who has a key of this file")
    parser.add_argument(
        "--new-key",
        type=Path,
        metavar="FILE",
        help="put a new key's hash into this file, print the key, and end",
    )
    parser.add_argument("--role", choices=("use", "admin"), default="use", help="of the new key (use)")
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="split the model over N processes (1); docs/parallel.md"
    )
    ray = parser.add_argument_group("on several processes or machines, by Ray: docs/serving.md")
    ray.add_argument("--ray", action="store_true", help="serve by Ray Serve, at RAY_ADDRESS or on this machine")
    ray.add_argument("--replicas", type=int, default=1, metavar="N", help="of each model (1)")
    ray.add_argument("--autoscale", type=int, nargs=2, metavar=("MIN", "MAX"), help="between so many, by the load")
    ray.add_argument(
        "--queue", type=int, default=1000, metavar="N", help="requests that wait where all are full (1000)"
    )
    ray.add_argument("--cpus", type=float, default=1, metavar="N", help="of a replica (1)")
    ray.add_argument("--gpus", type=float, default=0, metavar="N", help="of a replica (0)")
    ray.add_argument(
        "--drain", type=float, default=60, metavar="S", help="seconds for the sessions of one that ends (60)"
    )
    ray.add_argument("--write-config", type=Path, metavar="FILE", help="write the config for `serve deploy`, and end")
    for name in _LIMITS:
        parser.add_argument(
            f"--max-{name.replace('_', '-')}",
            type=float,
            metavar="N",
            help="what one session may use; for sessions and waiting: how many",
        )


def serve(options: argparse.Namespace) -> int:
    """Load and check the models, and serve until interrupted; returns the exit code."""
    from nnatomy.cli.load import load
    from nnatomy.serve.app import Server
    from nnatomy.serve.keys import Keys, check_address, new_key
    from nnatomy.serve.limits import Limits
    from nnatomy.serve.run import bind, run

    if not 0 <= options.port < 65536:
        raise InputError(f"--port {options.port}: ports are 1 to 65535, or 0 for any that is free.")
    if options.new_key is not None:
        sys.stdout.write(f"{new_key(options.new_key, options.role)}\n")
        return 0
    keys = Keys() if options.key_file is None else Keys.read(options.key_file)
    check_address(options.host, keys)
    given = {name: getattr(options, f"max_{name}") for name in _LIMITS}
    kinds = {field.name: field.type for field in fields(Limits)}
    chosen = {name: int(one) if kinds[name] == "int" else one for name, one in given.items() if one is not None}
    if options.ray:
        return _serve_by_ray(options, chosen)
    if options.replicas != 1 or options.autoscale or options.write_config:
        raise InputError("--replicas, --autoscale and --write-config are for --ray.")
    limits = replace(Limits(), **chosen)
    if options.tp > 1:
        from nnatomy.parallel.served import serve_split

        return serve_split(options, keys, limits)
    with bind(options.host, options.port) as bound:
        models = {}
        for name in (options.model, *options.others):
            if name in models:
                raise InputError(f"{name} is given twice: clients tell models by their names.")
            one = copy(options)
            one.model = name
            models[name] = load(one)
        server = Server(models, keys, limits)
        sys.stderr.write(f"nnatomy: {', '.join(models)} at http://{options.host}:{bound.getsockname()[1]}\n")
        run(server, options.host, options.port, bound)
    return 0


def _serve_by_ray(options: argparse.Namespace, limits: dict[str, Any]) -> int:
    from nnatomy.cluster.config import Cluster, as_yaml, serve_config
    from nnatomy.cluster.run import run

    if not options.port:
        raise InputError("--port 0: Ray Serve is given its port; say which.")
    names = ("dtype", "device", "device_map", "offload_folder", "trust_remote_code")
    load = {name: getattr(options, name) for name in names}
    cluster = Cluster(
        models=(options.model, *options.others),
        replicas=tuple(options.autoscale) if options.autoscale else options.replicas,
        host=options.host,
        port=options.port,
        key_file=None if options.key_file is None else str(options.key_file.absolute()),
        limits=limits,
        queue=options.queue,
        drain=options.drain,
        cpus=options.cpus,
        gpus=options.gpus,
        load={name: one for name, one in load.items() if one},
    )
    if options.write_config is not None:
        options.write_config.write_text(as_yaml(serve_config(cluster)), encoding="utf-8")
        return 0
    sys.stderr.write(f"nnatomy: {', '.join(cluster.models)} at http://{options.host}:{options.port}, by Ray Serve\n")
    run(cluster)
    return 0
