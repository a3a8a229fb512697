"""What a method warns of and logs while it runs here, for its client: apart for each, though all are in one process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

#: Warnings that Python shows to nobody but the author of a script are not for a client.
_UNSHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
_MOST, _TEXT = 1000, 20_000


class Heard:
    """Of one method.

    Attributes:
        warnings: [category, text] of each.
        log: [logger, level, text] of each.
    """

    def __init__(self) -> None:
        self.warnings: list[list[str]] = []
        self.log: list[list[Any]] = []


#: Where what this thread warns of and logs goes. A trace's threads have it of the one that opened it.
heard: ContextVar[Heard | None] = ContextVar("heard", default=None)


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        here = heard.get()
        if here is not None and len(here.log) < _MOST:
            here.log.append([record.name, record.levelno, record.getMessage()[:_TEXT]])


_lock, _listeners = Lock(), 0
_logger, _handler = logging.getLogger("nnatomy"), _Log(logging.INFO)
_before: list[Any] = []


@contextmanager
def listening() -> Iterator[None]:
    """While some thread is within, warnings are told each time, and go where `heard` says; others' go where they went."""
    global _listeners
    with _lock:
        _listeners += 1
        if _listeners == 1:
            filters = warnings.catch_warnings()
            filters.__enter__()
            _before[:] = [filters, warnings.showwarning, _logger.level]
            warnings.simplefilter("always")
            warnings.showwarning = _show  # type: ignore[assignment]
            _logger.setLevel(logging.INFO)
            _logger.addHandler(_handler)
    try:
        yield
    finally:
        with _lock:
            _listeners -= 1
            if _listeners == 0:
                _logger.removeHandler(_handler)
                _logger.setLevel(_before[2])
                _before[0].__exit__(None, None, None)
                _before.clear()


def _show(message: Any, category: Any, *where: Any) -> None:
    here = heard.get()
    if here is None:
        if _before:
            _before[1](message, category, *where)
    elif len(here.warnings) < _MOST and not issubclass(category, _UNSHOWN):
        here.warnings.append([category.__name__, str(message)[:_TEXT]])
