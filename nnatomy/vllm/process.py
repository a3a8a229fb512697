"""An engine in a process of its own: a server on this machine that the model's script starts, and that ends with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import finalize

import torch

from nnatomy.errors import InputError, LoadError, a_kind
from nnatomy.remote.model import new_at_server
from nnatomy.serve.keys import new_key
from nnatomy.standardized.asked_for import check_model
from nnatomy.vllm.arguments import check_engine, tokenizer_of

_ADDRESS = re.compile(r"^nnatomy: .* at (http://127\.0\.0\.1:\d+)$", re.MULTILINE)
_ERROR = re.compile(r"^nnatomy: (.*)$", re.MULTILINE)


def in_another_process(model: Any, tokenizer: Any, engine: str, given: Mapping[str, Any]) -> Any:
    """The model on an engine in another process, or in one for each part of it: `distributed_executor_backend="mp"`.

    Args:
        given: as `VllmTransformer` takes them.

    Raises:
        InputError, LoadError: as the process itself tells it.
    """
    check_engine(engine)
    check_model(model)
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"distributed_executor_backend='mp': the process loads the model itself; {a_kind(model)} was given."
        )
    with tokenizer_of(tokenizer) as of_engine:
        process = ServerProcess(str(model), engine, {**given, **of_engine})
    try:
        remote = new_at_server(str(model), tokenizer, server=process.address, api_key=process.key)
    except BaseException:
        process.stop()
        raise
    finalize(remote.engine, process.stop)  # which all views of the model have
    remote.process = process
    return remote


class ServerProcess:
    """`nnatomy serve MODEL --engine NAME`, at a free port of this machine, for who has its key. It ends with this process.

    Attributes:
        address: http://127.0.0.1:PORT.
        key: the key.
    """

    def __init__(self, model: str, engine: str, given: Mapping[str, Any]) -> None:
        options = {name: one for name, one in given.items() if name != "distributed_executor_backend"}
        command = [sys.executable, "-m", "nnatomy", "serve", model, "--engine", engine, "--port", "0", "--until-eof"]
        command += ["--tp", str(options.pop("tensor_parallel_size", 1))]
        command += [f"--engine-arg={name}={_written(name, one)}" for name, one in options.items()]
        with tempfile.TemporaryDirectory() as folder:
            keys, said = Path(folder) / "keys", Path(folder) / "said"
            self.key = new_key(keys, "admin")
            with said.open("w") as file:
                self._process = subprocess.Popen(
                    [*command, "--key-file", str(keys)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    start_new_session=True,  # Ctrl-C is for this process
                )
            try:
                self.address = self._address(said)
            except BaseException:
                self.stop()
                raise

    def _address(self, said: Path) -> str:
        """Where it is, when it is there. Raises InputError or LoadError if it ends before."""
        while True:
            code, text = self._process.poll(), said.read_text(errors="replace")
            if found := _ADDRESS.search(text):
                return found[1]
            if code is not None:
                told = _ERROR.search(text)
                why = told[1] if told else "\n".join(text.strip().split("\n")[-20:])
                raise (InputError if code == 2 else LoadError)(f"The engine's process has ended: {why}")
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def stop(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._process.kill()
        self._process.wait()


def _written(name: str, value: Any) -> str:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    try:
        return json.dumps(str(value) if isinstance(value, Path) else value)
    except TypeError:
        raise InputError(
            f"{name}={value!r:.60}: an engine in another process takes numbers, texts, lists and dicts. Serve it by a script of "
            "yours, or leave out distributed_executor_backend='mp', so that it is in this process."
        ) from None
