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
from typing import TYPE_CHECKING, Any

import nnatomy
from nnatomy.cli.serve import add_serve, serve
from nnatomy.errors import InputError, LayerIndexError, NnatomyError

if TYPE_CHECKING:
    from nnatomy.cli.report import Report

_DTYPES = ("float32", "float64", "float16", "bfloat16")
#: The commands that draw a plot, and the pictures that one is written as.
_DRAW, _PICTURES = ("lens", "attend", "attribute", "patch"), (".png", ".svg", ".pdf")
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
        if options.out:
            _check_file(options.out, options.command in _DRAW)
        with redirect_stdout(sys.stderr):  # whatever the model's own code prints
            report: Report = getattr(import_module(f"nnatomy.cli.{options.command}"), options.command)(options)
        _write(f"{json.dumps(report.data, indent=1)}\n" if options.json else report.text())
        if options.out:
            report.write(options.out)
            sys.stderr.write(f"nnatomy: written to {options.out}\n")
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader has enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - told on stderr, all of it with --debug
        name = "" if isinstance(error, NnatomyError) else f"{type(error).__name__}: "
        sys.stderr.write(traceback.format_exc() if options.debug else f"nnatomy: {name}{error}\n")
        return _USAGE if isinstance(error, (InputError, LayerIndexError)) else _FAILED
    return 0 if report.ok else _FAILED


def _check_file(path: Path, draws: bool) -> None:
    """Raise InputError if nothing can be written there, before the work is done."""
    endings = (".html", *_PICTURES) if draws else (".html",)
    if path.suffix not in endings:
        raise InputError(f"--out {path}: this command writes {' or '.join(endings)}, as the file's name ends.")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(
            f"--out {path}: {'that is a folder' if path.is_dir() else f'there is no folder {path.parent}'}."
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--out {path}: it may not be written.")


def _write(shown: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    loading = argparse.ArgumentParser(add_help=False)
    loading.add_argument("model", metavar="ID", help="the model")
    loading.add_argument("--dtype", choices=_DTYPES, help="load the weights in this precision")
    loading.add_argument("--device", type=_device, help="where to run it: cpu (the default), cuda, cuda:1, mps, ...")
    spread = "spread it instead over devices, memory and disk: auto, balanced, sequential, or a JSON object of modules' paths"
    loading.add_argument("--device-map", type=_device_map, metavar="MAP", help=spread)
    loading.add_argument("--offload-folder", metavar="FOLDER", help="where the weights lie that the map puts on disk")
    loading.add_argument(
        "--trust-remote-code", action="store_true", help="run the model's own code from its repository"
    )
    loading.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common = argparse.ArgumentParser(add_help=False, parents=[loading])
    out = "write a self-contained page too (.html), or the plot (.png, .svg, .pdf)"
    common.add_argument("--out", "--html", type=Path, metavar="FILE", help=out)
    common.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    parser = argparse.ArgumentParser(
        prog="nnatomy",
        description="Look into a Hugging Face transformer.",
        epilog=_ENDING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nnatomy {nnatomy.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", parents=[common])

    add("check", "which standard names hold on the model, layer by layer")
    add("anatomy", "the model's modules, with the standard names beside its own")
    lens = add("lens", "the logit lens: what each layer would say next, at each position")
    lens.add_argument("prompt", metavar="PROMPT")
    lens.add_argument("--top", type=int, default=1, metavar="K", help="show the K most probable tokens (1)")
    attend = add("attend", "what the heads of a layer attend to")
    attend.add_argument("prompt", metavar="PROMPT")
    attend.add_argument("--layer", type=int, required=True, metavar="L", help="the layer; -1 is the last")
    attribute = add("attribute", "direct logit attribution: what each part adds to the answer's logit")
    attribute.add_argument("prompt", metavar="PROMPT")
    attribute.add_argument("--answer", required=True, metavar="X", help="the token, with its space: ' Paris'")
    attribute.add_argument("--wrong", metavar="Y", help="a token whose logit is subtracted")
    attribute.add_argument("--by", choices=("layer", "component", "head"), default="component", help="(component)")
    attribute.add_argument("--top", type=int, default=20, metavar="K", help="show the K parts that add most (20)")
    patch = add("patch", "activation patching: where the answer is carried")
    patch.add_argument("clean", metavar="CLEAN", help="the prompt with the answer")
    patch.add_argument("corrupted", metavar="CORRUPTED", help="one of as many tokens with another")
    patch.add_argument("--answer", required=True, metavar="X", help="the token after CLEAN, with its space: ' Paris'")
    patch.add_argument("--wrong", required=True, metavar="Y", help="the token after CORRUPTED")
    patch.add_argument("--point", metavar="NAME", help="what is patched (layers_output; with --heads heads_output)")
    patch.add_argument("--heads", action="store_true", help="one head at a time, at all positions")
    steer = add("steer", "what the model writes with a direction added to its stream")
    steer.add_argument("prompt", metavar="PROMPT")
    steer.add_argument("--toward", required=True, metavar="A", help="a text that has what is to be added")
    steer.add_argument("--away", required=True, metavar="B", help="one that lacks it")
    steer.add_argument("--layer", type=int, required=True, metavar="L", help="after which layer")
    factors = "how much of the difference of the two texts' last positions, one or several (0 1 2)"
    steer.add_argument("--factor", type=float, nargs="+", default=[0.0, 1.0, 2.0], metavar="F", help=factors)
    steer.add_argument("--tokens", type=int, default=20, metavar="N", help="how many tokens to write (20)")
    add_serve(commands, loading)
    return parser


def _device_map(text: str) -> Any:
    import json

    if text in ("auto", "balanced", "balanced_low_0", "sequential"):
        return text
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither auto, balanced, balanced_low_0 nor sequential, and no JSON object such as "
            """'{"model.embed_tokens": "cpu", "model.layers.0": "disk", ...}'"""
        )
    return found


def _device(name: str) -> Any:
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).split("\n")[0]) from None
