"""The command line: arguments, what is printed, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import torch

from nnatomy.cli.load import DTYPES
from nnatomy.cli.report import Report, page, text
from nnatomy.cli.serve import add_serve, serve
from nnatomy.errors import InputError, NnatomyError

_FAILED, _USAGE, _INTERRUPTED, _BROKEN_PIPE = 1, 2, 130, 141
_ENDING = """exit codes: 0 all is well; 1 the model fails the check, cannot be loaded, or an error; 2 wrong usage;
130 interrupted. Where ID is: a model's id on the Hugging Face hub, a folder, demo:gpt2, demo:llama or demo:smollm2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: those after the program's name; by default the process's own.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "serve":
            return serve(options)
        with redirect_stdout(sys.stderr):  # whatever the model's own code prints
            report: Report = getattr(import_module(f"nnatomy.cli.{options.command}"), options.command)(options)
            if options.html:
                options.html.write_text(page(report), encoding="utf-8")
        _write(f"{json.dumps(report.data, indent=1)}\n" if options.json else text(report))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader has enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - told on stderr, all of it with --debug
        name = "" if isinstance(error, NnatomyError) else f"{type(error).__name__}: "
        sys.stderr.write(traceback.format_exc() if options.debug else f"nnatomy: {name}{error}\n")
        return _USAGE if isinstance(error, InputError) else _FAILED
    return 0 if report.ok else _FAILED


def _write(shown: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    loading = argparse.ArgumentParser(add_help=False)
    loading.add_argument("model", metavar="ID", help="the model")
    loading.add_argument("--dtype", choices=DTYPES, help="load the weights in this precision")
    loading.add_argument("--device", type=_device, default="cpu", help="where to run it: cpu, cuda, cuda:1, mps, ...")
    loading.add_argument(
        "--trust-remote-code", action="store_true", help="run the model's own code from its repository"
    )
    loading.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common = argparse.ArgumentParser(add_help=False, parents=[loading])
    common.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page too")
    common.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    parser = argparse.ArgumentParser(
        prog="nnatomy",
        description="Look into a Hugging Face transformer.",
        epilog=_ENDING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", parents=[common])

    add("check", "which standard names hold on the model, layer by layer")
    add("anatomy", "the model's modules, with the standard names beside its own")
    lens = add("lens", "the logit lens: what each layer would say next, at each position")
    lens.add_argument("prompt", metavar="PROMPT")
    lens.add_argument("--top", type=int, default=1, metavar="K", help="show the K most probable tokens (1)")
    patch = add("patch", "activation patching: where the answer is carried")
    patch.add_argument("clean", metavar="CLEAN", help="the prompt with the answer")
    patch.add_argument("corrupted", metavar="CORRUPTED", help="one of as many tokens with another")
    patch.add_argument("--answer", required=True, metavar="X", help="the token after CLEAN, with its space: ' Paris'")
    patch.add_argument("--wrong", required=True, metavar="Y", help="the token after CORRUPTED")
    patch.add_argument("--point", default="layers_output", metavar="NAME", help="what is patched (layers_output)")
    add_serve(commands, loading)
    return parser


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).split("\n")[0]) from None
