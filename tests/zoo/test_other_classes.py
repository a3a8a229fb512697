"""The table of docs/other_classes.md is of all classes, and current where a test is cheap."""

from __future__ import annotations

import pytest
import releases

import zoo
from nnatomy import StandardizedTransformer
from nnatomy.errors import UnknownArchitectureError
from zoo import other_classes


def rows() -> dict[str, str]:
    lines = other_classes.PAGE.read_text().partition(other_classes.HEAD)[2].splitlines()
    return {line.split("|")[1].strip(): line for line in lines}


def test_the_table_is_of_all_classes() -> None:
    assert other_classes.CLASSES.keys() <= rows().keys()
    assert releases.missing(rows(), other_classes.CLASSES) == set()


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, line in rows().items()
        if name
        not in (
            "LEDForConditionalGeneration",  # pads to a window and says so
            "BigBirdPegasusForConditionalGeneration",  # as that
        )
    ],
)
def test_a_row_is_current(name: str) -> None:
    releases.need(name, other_classes.CLASSES)
    assert other_classes.row(name) == rows()[name], "python tests/zoo/other_classes.py"


def test_what_is_refused_is_in_the_table_of_reasons() -> None:
    assert {name for name, line in rows().items() if "| refused: " in line} == zoo.REFUSED_CLASSES.keys()


@pytest.mark.parametrize("name", zoo.REFUSED_CLASSES)
def test_what_is_refused_says_why(name: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=zoo.REFUSED_CLASSES[name][1]):
        StandardizedTransformer(zoo.build_class(name, other_classes.CLASSES[name]))


@pytest.mark.parametrize("name", zoo.NOT_BUILT)
def test_a_class_that_is_not_built_fails_for_the_reason_given(name: str) -> None:
    _, error = zoo.NOT_BUILT[name].split("; raises ")
    with pytest.raises(ImportError) as raised:
        zoo.build_class(name, other_classes.CLASSES[name])
    assert f"{raised.type.__name__}: {str(raised.value).strip()}".startswith(error)
