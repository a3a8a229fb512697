"""`nnatomy serve`: a server of models, for clients elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from threading import Thread
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
    parser.add_argument(
        "--engine", metavar="NAME", help="what runs the model: vllm; Transformers if it is left out; docs/vllm.md"
    )
    parser.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of vllm.LLM, such as max_model_len=4096 (JSON, or a text), or validate=algebra; may be given several times",
    )
    parser.add_argument("--until-eof", action="store_true", help="end when the standard input does")
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
    from nnatomy import StandardizedTransformer
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
    engine = {} if options.engine is None and not options.engine_arg else _engine_options(options)
    keys = Keys() if options.key_file is None else Keys.read(options.key_file)
    check_address(options.host, keys)
    given = {name: getattr(options, f"max_{name}") for name in _LIMITS}
    kinds = {field.name: field.type for field in fields(Limits)}
    chosen = {name: int(one) if kinds[name] == "int" else one for name, one in given.items() if one is not None}
    if options.until_eof and os.environ.get("RANK", "0") == "0":  # the others end with it
        Thread(target=_end_at_eof, daemon=True).start()
    if options.ray:
        return _serve_by_ray(options, chosen)
    if options.replicas != 1 or options.autoscale or options.write_config:
        raise InputError("--replicas, --autoscale and --write-config are for --ray.")
    limits = replace(Limits(), **chosen)
    if options.tp > 1:
        from nnatomy.parallel.served import serve_split

        return serve_split(options, keys, limits, engine)
    with bind(options.host, options.port) as bound:
        models = {}
        for name in (options.model, *options.others):
            if name in models:
                raise InputError(f"{name} is given twice: clients tell models by their names.")
            one = copy(options)
            one.model = name
            models[name] = StandardizedTransformer(name, **engine) if engine else load(one)
        run(Server(models, keys, limits), options.host, options.port, bound, told=", ".join(models))
    return 0


def _end_at_eof() -> None:
    """Whoever has started this process is gone, or wants it to end."""
    while os.read(0, 1024):  # not by sys.stdin, whose lock Python wants when it ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the engine is loaded with. Raises InputError for what does not go with one."""
    from nnatomy.standardized.asked_for import check_model
    from nnatomy.vllm.arguments import check_engine, import_vllm

    if options.engine is None:
        raise InputError(f"--engine-arg {options.engine_arg[0]}: it is for --engine vllm.")
    check_engine(options.engine)
    if options.others:
        raise InputError(
            "--engine: vLLM runs one model in a process. Start a server for each, at ports of their own: nnatomy serve MODEL "
            "--engine vllm --port N."
        )
    if options.ray:
        raise InputError("--engine, --ray: a server of Ray's has models on Transformers. Leave out one of the two.")
    for name in ("device", "device_map", "offload_folder"):
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')}: the engine takes the devices that its build is for. Leave it out; --tp N splits "
                "the model."
            )
    import_vllm()
    check_model(options.model)
    found: dict[str, Any] = {"engine": options.engine}
    for one in options.engine_arg:
        name, equals, value = one.partition("=")
        if not (equals and name):
            raise InputError(f"--engine-arg {one}: give NAME=VALUE, such as max_model_len=4096.")
        if name in found:
            raise InputError(f"--engine-arg {one}: {name} is given twice, or is no argument of vllm.LLM.")
        found[name] = _value(value)
    if options.tp > 1:
        found["tensor_parallel_size"] = options.tp
    if options.dtype is not None:
        found["dtype"] = options.dtype
    if options.trust_remote_code:
        found["trust_remote_code"] = True
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


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
    run(cluster)
    return 0
