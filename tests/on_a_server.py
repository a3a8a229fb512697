"""The tests of methods, with models that another process serves: a plugin of pytest.

    PYTHONPATH=tests python -m pytest -p on_a_server tests/methods        # make remote-methods

Each `StandardizedTransformer(model)` of a test is one at a server, to which the model has gone by a folder. Each method that is
called with it is called with a local one too, and has to give the same, bit for bit, or raise the same error. A model that a server
cannot have stays local, and is counted, with the reason. What is not to be had is in `not_at_a_server.txt`: such a test is
expected to fail, and one that passes fails the run.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

import pytest
import torch
from torch import Tensor

#: Tests that look at what a method calls or leaves behind, so that it is called once there.
ONCE = (
    "test_for_a_metric_that_is_linear_one_step_is_attribution_patching",
    "test_progress_is_shown_with_what_is_given",
)
#: Tests that have hooks around what the library runs, and not around a reference.
HOOKS = ("test_the_inverse_of_an_edited_view_has_the_edit_once",)
#: Tests whose hooks are a part of the model, here and there.
BOTH = ("test_whole_prompts_where_more_than_keys_and_values_goes",)
#: Tests that count a model's passes by hooks: each pass that is run at the server is run by the local one too.
COUNTED = (
    "test_names_of_one_layer_come_in_one_pass_in_any_order",
    "test_by_default_a_pass_has_1024_tokens_at_most_and_little_padding",
    "test_similar_lengths_share_a_batch",
    "test_where_padding_shows_only_prompts_of_one_length_share_a_batch",
)
#: Tests that change the library in this process, so that methods run here, pass by pass.
CHANGED = ("test_what_mixes_prompts_is_seen", "test_where_padding_on_the_left_shows_it_is_not_moved_there")


def _not_to_be_had() -> dict[str, str]:
    """By the ids of tests, behind `tests/methods/`: why they cannot be had of a remote model."""
    found, why = {}, ""
    for line in Path(__file__).with_name("not_at_a_server.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            why = line.removeprefix("# ")
        elif line:
            found[line] = why
    return found


_local: Counter[str] = Counter()
_calls: Counter[str] = Counter()
_state: dict[str, Any] = {}
#: By modules of skeletons, those of the local models.
_twins: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class _Servers:
    """The process that serves, and what it serves."""

    def __init__(self) -> None:
        from remote_server import free_port

        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, str(Path(__file__).with_name("many_models.py")), str(self.port)]
        self._process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._addresses: dict[str, str] = {}

    def address(self, hf_model: Any, tokenizer: Any, validate: Any) -> tuple[str, str]:
        """Where a model is served, and by what name. Raises ValueError, with the reason, if it cannot be."""
        from nnatomy.serve.tensors import Weights

        told = {
            "class": type(hf_model).__name__,
            "attention": hf_model.config._attn_implementation,
            "dtype": str(hf_model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer is not None,
            "validate": validate,
        }
        from nnatomy.serve.hello import weights_hash

        digest = weights_hash(Weights(hf_model))
        key = json.dumps([digest, str(hf_model.config.to_dict()), told, id(tokenizer) if tokenizer is not None else 0])
        if key not in self._addresses:
            if not hasattr(hf_model, "save_pretrained") or hf_model.config.is_encoder_decoder:
                raise ValueError(f"{type(hf_model).__name__}: no decoder of Transformers'")
            if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
                raise ValueError(f"{type(tokenizer).__name__}: no tokenizer of Transformers'")
            told["folder"] = f"{self._folder.name}/{len(self._addresses)}"
            hf_model.save_pretrained(told["folder"])
            if tokenizer is not None:
                tokenizer.save_pretrained(told["folder"])
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            if "error" in answer:
                raise ValueError(f"{type(hf_model).__name__}: {answer['error'][:150]}")
            self._addresses[key] = f"http://127.0.0.1:{self.port}/{answer['number']} {told['folder']}"
        address, name = self._addresses[key].split(" ")
        return address, name

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


def _make(real: Any, *args: Any, **kwargs: Any) -> Any:
    """The model at a server, with the local one as its `twin`; or the local one."""
    for model in _state.setdefault("models", []):
        if args and args[0] is model.hf_model:  # the skeleton, wrapped once more
            return model
    from nnatomy.errors import NnatomyError

    local = real(*args, **kwargs)
    try:
        if set(kwargs) - {"tokenizer", "validate"}:
            raise ValueError(f"arguments of loading: {', '.join(sorted(kwargs))}")
        if local.hf_model.training or local.device.type != "cpu":
            raise ValueError("training, or another device")
        from nnatomy.serve.hello import weights_hash
        from nnatomy.serve.tensors import Weights

        servers = _state.setdefault("servers", None) or _Servers()
        _state["servers"] = servers
        address, name = servers.address(local.hf_model, local.tokenizer, kwargs.get("validate", True))
        model = real(name, server=address)
        if model._told["hash"] != weights_hash(Weights(local.hf_model)):
            raise ValueError(f"{type(local.hf_model).__name__}: its weights are not what its folder has")
    except (ValueError, NnatomyError) as error:
        _local[f"{type(error).__name__}: {error}"[:200]] += 1
        return local
    model.twin = local
    model.whole_methods = not _is_one_of(CHANGED)
    _twins.update(zip(model.hf_model.modules(), local.hf_model.modules(), strict=True))
    _state["models"] = [*_state["models"][-50:], model]
    _calls["models"] += 1
    return model


def _is_one_of(names: tuple[str, ...]) -> bool:
    return any(f"::{name}" in os.environ.get("PYTEST_CURRENT_TEST", "") for name in names)


def _asks_a_test() -> bool:
    """Whether a line of a test or of its reference has called what calls this, and not the library nor Transformers."""
    path = Path(sys._getframe(2).f_code.co_filename)
    if _is_one_of(HOOKS):
        return False
    return path.is_relative_to(Path(__file__).parent) and path != Path(__file__)


def _references_are_local() -> None:
    """A test's reference runs and hooks the wrapped model: that is the local one, as a skeleton has nothing to run."""
    from torch.nn import Module

    from nnatomy.remote.forward import RemoteForward
    from nnatomy.remote.model import RemoteTransformer

    real: Any = RemoteTransformer.hf_model

    def hf_model(self: Any) -> Any:
        return self.twin.hf_model if _asks_a_test() and "twin" in vars(self) else real.fget(self)

    RemoteTransformer.hf_model = property(hf_model)  # type: ignore[misc]
    RemoteForward.__call__ = _counted(RemoteForward.__call__)  # type: ignore[method-assign]
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        setattr(Module, name, _at_the_twin(getattr(Module, name)))


def _counted(forward: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_one_of(COUNTED) and (twin := _twins.get(self._root)) is not None:
            with torch.no_grad():
                twin(*args, **kwargs)
        return forward(self, *args, **kwargs)

    return call


def _at_the_twin(register: Any) -> Any:
    from torch.utils import _pytree as pytree

    from nnatomy.remote.tensor import RemoteTensor

    def registered(self: Any, hook: Any, **kwargs: Any) -> Any:
        if (twin := _twins.get(self)) is None or not _asks_a_test():
            return register(self, hook, **kwargs)

        def called(*args: Any) -> Any:
            return pytree.tree_map_only(RemoteTensor, RemoteTensor.local, hook(*args))

        handle = register(twin, called, **kwargs)
        if _is_one_of(BOTH):
            finalize(handle, register(self, hook, **kwargs).remove)
        return handle

    return registered


def _leaves(value: Any, depth: int = 0) -> list[Any]:
    if isinstance(value, Tensor):
        return [value.local() if hasattr(value, "local") else value.detach()]
    if isinstance(value, dict):
        return [one for key, each in value.items() for one in (key, *_leaves(each, depth + 1))]
    if isinstance(value, (list, tuple)):
        return [one for each in value for one in _leaves(each, depth + 1)]
    if depth < 4 and hasattr(value, "__dataclass_fields__"):
        return _leaves(vars(value), depth + 1)
    return [value] if isinstance(value, (str, int, float, bool)) else []


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and (one == other or one != one)
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def _compared(function: Any) -> Any:
    """The method, which is called with the local model too."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from nnatomy.remote.model import RemoteTransformer
        from nnatomy.remote.tensor import RemoteTensor

        models = [one for one in (*args, *kwargs.values()) if isinstance(one, RemoteTransformer)]
        if not models or any(one.edits or one._blocks.is_open_here or not hasattr(one, "twin") for one in models):
            return function(*args, **kwargs)
        if _is_one_of(ONCE):
            return function(*args, **kwargs)

        def twin(value: Any) -> Any:
            if isinstance(value, RemoteTensor):
                return value.local()
            if not isinstance(value, RemoteTransformer):
                return value
            if value.tokenizer is not None:
                value.twin.tokenizer.padding_side = value.tokenizer.padding_side
            return value.twin

        before, failed, found = torch.get_rng_state(), None, None
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            failed = error
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        _calls[function.__name__] += 1
        logging.disable()
        try:
            wanted = function(*map(twin, args), **{key: twin(one) for key, one in kwargs.items()})
        except Exception as error:
            assert failed is not None, f"remote gives a result, and local {error!r}"
            its, mine = (f"{type(one).__name__}: {one}" for one in (failed, error))
            assert its == mine, f"remote says\n{its}\nand local\n{mine}"
            raise failed from None
        finally:
            logging.disable(logging.NOTSET)
            torch.set_rng_state(after)
        if failed is not None:
            raise failed
        mine, its = _leaves(found), _leaves(wanted)
        assert len(mine) == len(its)
        assert all(map(_same, mine, its)), f"{function.__name__} is not bit for bit the same"
        return found

    return wrapped


def pytest_collection(session: pytest.Session) -> None:
    import nnatomy
    from nnatomy import methods
    from nnatomy.remote.catalog import WHOLE

    real = nnatomy.StandardizedTransformer

    class Anywhere(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return _make(real, *args, **kwargs)

        def __instancecheck__(cls, one: Any) -> bool:
            return isinstance(one, real)

    nnatomy.StandardizedTransformer = Anywhere("StandardizedTransformer", (), {"__doc__": real.__doc__})  # type: ignore[misc]
    _references_are_local()
    for name in WHOLE:
        setattr(methods, name, _compared(getattr(methods, name)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = _not_to_be_had()
    for item in items:
        if why := reasons.get(item.nodeid.removeprefix("tests/methods/")):
            item.add_marker(pytest.mark.xfail(reason=why, strict=True))


def pytest_runtest_teardown() -> None:
    """What has failed in a test, and was not asked for there, is not for the next one."""
    for model in _state.get("models", []):
        if not model._connection.lost:
            model._connection.command("clear")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    write = terminalreporter.write_line
    write(f"{_calls.pop('models', 0)} models at a server; methods compared: {dict(_calls)}")
    for why, count in _local.most_common():
        write(f"{count} local: {why}")


def pytest_unconfigure() -> None:
    if servers := _state.pop("servers", None):
        servers.stop()
