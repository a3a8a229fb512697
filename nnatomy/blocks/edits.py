"""Lasting edits: views of a model whose every trace runs some edits first."""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any, Generic, TypeVar

from nnatomy.blocks.capture import Body, Names
from nnatomy.core.frames import frame_of_with

View = TypeVar("View")


def with_edit(view: View, edit: Any) -> View:
    """A copy of the view, of the same module, with one more edit."""
    edited: Any = copy.copy(view)
    edited.edits = (*edited.edits, edit)
    return edited


class EditBlock(Generic[View]):
    """`with model.edit() as edited:` whose body becomes an edit of the new view."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._body: Body | None = None
        self._names: dict[str, Any] = {}  # those of the frame that the body uses

    def __enter__(self) -> View:
        body = self._body = Body(frame_of_with())
        names, global_names = self._names, body.frame.f_globals

        def edit() -> None:
            body.run(Names(lambda name: names[name] if name in names else global_names[name]))

        edited = with_edit(self._view, edit)
        body.skip()
        return edited

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._body is not None
        skipped = self._body.left(kind)
        self._names.update(self._body.uses())
        self._body.forget()
        return skipped
