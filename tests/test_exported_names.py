"""The public names are exactly these."""

from __future__ import annotations

import types

import nnatomy
import nnatomy.core
import nnatomy.methods


def public(module: types.ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_top_level() -> None:
    assert public(nnatomy) == {"ArchConfig", "StandardizedTransformer"}


def test_core() -> None:
    names = {"Block", "Cache", "Collector", "ModuleView", "Slot", "Tap", "Trace", "Traceable"}
    assert public(nnatomy.core) == names


def test_methods() -> None:
    assert public(nnatomy.methods) == {"logit_lens"}
