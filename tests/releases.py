"""What an older release of Transformers than the tables' does not have, or does otherwise.

The tables of docs/architectures.md and docs/other_classes.md, and the tests, are of one release. There and in later ones whatever a
test asks for has to be there. In an older one a test is skipped that asks for a type or class which that does not have, and the
tests in `OTHERWISE` have to fail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
import transformers
from packaging.version import Version

#: The release that the tables are of.
TABLES = "5.24.0"
RELEASE = Version(transformers.__version__)
IS_OLDER = Version(TABLES) > RELEASE


def need(name: str, there: Collection[str]) -> None:
    """Skip the test if the release is an older one and does not have that type or class."""
    if IS_OLDER and name not in there:
        pytest.skip(f"Transformers {RELEASE} has no {name}, which {TABLES} has")


def missing(names: Iterable[str], there: Collection[str]) -> set[str]:
    """Those of the names that are not there and should be: none in an older release."""
    return set() if IS_OLDER else set(names) - set(there)


_NOT_CAUSAL = "it is not causal, whatever its config says"
_NAMES, _CLASSES, _INSIDE = (
    "tests/zoo/test_names.py::test_a_type",
    "tests/zoo/test_other_classes.py::test_a_row_is_current",
    "tests/standardized/test_attention_internals_zoo.py::test_a_type",
)
_ENCODERS = "tests/standardized/test_encoder_decoder.py"
#: Tests that fail before a release: that one, and what is otherwise before.
OTHERWISE: dict[str, tuple[str, str]] = {
    **{
        f"{test}[{name}]": ("5.23", _NOT_CAUSAL)
        for test in (_NAMES, _INSIDE, "tests/zoo/test_zoo.py::test_a_type")
        for name in ("big_bird", "megatron-bert", "rembert", "roformer")
    },
    f"{_NAMES}[axk1]": ("5.23", "layer 3 of the tiny model is a mixture of experts, too"),
    f"{_CLASSES}[UMT5ForConditionalGeneration]": ("5.23", "under SDPA its decoder is not causal"),
    f"{_ENCODERS}::test_the_second_attention_is_cross_attention_and_no_mlp[UMT5ForConditionalGeneration]": (
        "5.23",
        "under SDPA its decoder is not causal",
    ),
    f"{_CLASSES}[FSMTForConditionalGeneration]": ("5.23", "its embedding is not given the ids as they come"),
    f"{_ENCODERS}::test_a_decoder_of_another_layout_has_the_names_of_no_layer[FSMT]": (
        "5.23",
        "its embedding is not given the ids as they come",
    ),
    f"{_CLASSES}[SwitchTransformersForConditionalGeneration]": ("5.23", "its routers have their names"),
    f"{_NAMES}[inkling2_text]": ("5.24", "its head and routers compute otherwise"),
    f"{_CLASSES}[Inkling2ForConditionalGeneration]": ("5.24", "its head and routers compute otherwise"),
    f"{_CLASSES}[Llama4ForConditionalGeneration]": ("5.24", "it runs"),
    "tests/zoo/test_other_classes.py::test_what_is_refused_says_why[Llama4ForConditionalGeneration]": (
        "5.24",
        "it runs",
    ),
}


def mark(item: pytest.Item) -> None:
    """Expect what is otherwise in an older release to fail there: where it does not, the row goes."""
    release, why = OTHERWISE.get(item.nodeid, (None, ""))
    if release is not None and Version(release) > RELEASE:
        item.add_marker(pytest.mark.xfail(reason=f"before Transformers {release} {why}", strict=True))
