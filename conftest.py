"""Runtime shape checks for the whole suite, switched on before the library is imported."""

import gc
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import jaxtyping
import pytest

# On processors that are not Intel's, MKL's products are rounded by where in memory their factors lie, unless this is set, so that
# two runs of one model would differ. It is read when MKL is first used; processes that tests start inherit it.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

_jaxtyped = jaxtyping.jaxtyped


def checked(function: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """What the import hook puts on every function: `jaxtyped`, or where no annotation is of a shape, the type checker
    alone, which checks the same. (`jaxtyped` binds the arguments of each call to their names, which made half of what
    the suite takes.)"""
    if function is None:
        return partial(checked, typechecker=typechecker)
    # In a function beartype leaves a cycle.
    if inspect.isfunction(function) and "<locals>" not in function.__qualname__:
        try:
            hints = get_type_hints(function, include_extras=True)
        except (NameError, TypeError, AttributeError):
            pass  # a name that only type checkers have: jaxtyping leaves it out
        else:
            if "jaxtyping" not in repr(hints):
                return typechecker(function)
    return _jaxtyped(function, typechecker=typechecker)


jaxtyping.jaxtyped = checked
jaxtyping.install_import_hook("nnatomy", "beartype.beartype")
# Before pytest imports a single file, which would put the module `logit_lens` in the place of the function.
importlib.import_module("nnatomy.methods")
gc.collect()
gc.freeze()  # what is imported stays: not to be looked through at each collection
sys.path.insert(0, str(Path(__file__).parent / "tests"))  # `architectures`, `reference`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests by the type of model they are about: with `--dist loadgroup` a group runs in one worker.

    Tests of what an older release of Transformers does otherwise are expected to fail there.
    """
    releases = importlib.import_module("releases")
    for item in items:
        releases.mark(item)
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        model = params.get("model_type", params.get("name"))
        if isinstance(model, str):
            item.add_marker(pytest.mark.xdist_group(model.removeprefix("zoo ")))
