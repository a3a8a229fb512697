"""The demo of remote models: its analyses are those of the local ones, and it would see if they were not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nnatomy.demo import remote
from nnatomy.demo.analysis import analyse


def test_it_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MODELS", ("gpt2",))
    remote.main()
    assert "bit for bit" in capsys.readouterr().out


def test_it_sees_differences() -> None:
    found = analyse("gpt2")
    assert remote.differences(found, found) == []
    other = replace(found, attention=found.attention + 1e-6, summary="x")
    assert remote.differences(found, other) == ["results.summary", "results.attention"]
