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
    parser.add_argument("--port", type=int, default=8765, help="(8765)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="let in who has a key of this file")
    parser.add_argument(
        "--new-key",
        type=Path,
        metavar="FILE",
        help="put a new key's hash into this file, print the key, and end",
    )
    parser.add_argument("--role", choices=("use", "admin"), default="use", help="of the new key (use)")
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
    from nnatomy.serve.run import run

    if options.new_key is not None:
        sys.stdout.write(f"{new_key(options.new_key, options.role)}\n")
        return 0
    keys = Keys() if options.key_file is None else Keys.read(options.key_file)
    check_address(options.host, keys)
    given = {name: getattr(options, f"max_{name}") for name in _LIMITS}
    kinds = {field.name: field.type for field in fields(Limits)}
    chosen = {name: int(one) if kinds[name] == "int" else one for name, one in given.items() if one is not None}
    models = {}
    for name in (options.model, *options.others):
        if name in models:
            raise InputError(f"{name} is given twice: clients tell models by their names.")
        one = copy(options)
        one.model = name
        models[name] = load(one)
    server = Server(models, keys, replace(Limits(), **chosen))
    sys.stderr.write(f"nnatomy: {', '.join(models)} at http://{options.host}:{options.port}\n")
    run(server, options.host, options.port)
    return 0
