"""Users' code under type checkers: what each value is, and what is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = GOOD, WRONG = HERE / "user_code.py", HERE / "wrong_user_code.py"


#: A file, a line, and what is said of it.
Errors = list[tuple[str, int, str]]


def run(*command: str) -> str:
    """What a type checker says of both files, in one of which there are errors."""
    command = (sys.executable, "-m", *command, *map(str, FILES))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def errors_of_mypy() -> Errors:
    """Those of mypy, with this project's settings, and what it keeps of an earlier run."""
    found = [json.loads(line) for line in run("mypy", "--output=json").splitlines()]
    return [(Path(one["file"]).name, one["line"], one["message"]) for one in found if one["severity"] == "error"]


def errors_of_basedpyright() -> Errors:
    said = run("basedpyright", "--outputjson", "--level", "error", "--pythonpath", sys.executable)
    found = json.loads(said)["generalDiagnostics"]
    return [(Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"]) for one in found]


@pytest.mark.parametrize("errors_of", [errors_of_mypy, errors_of_basedpyright])
def test_a_type_checker_knows_what_the_names_are(errors_of: Callable[[], Errors]) -> None:
    errors = errors_of()
    wrong = [i for i, line in enumerate(WRONG.read_text().splitlines(), 1) if line.endswith("  # wrong")]
    assert [one for one in errors if one[0] != WRONG.name] == []
    assert sorted({line for _, line, _ in errors}) == wrong
