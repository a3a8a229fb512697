"""Lasting edits as blocks: `with model.edit() as edited: ...`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnatomy.blocks.capture import Body, Names


class EditBlock:
    """A `with` whose body becomes an edit.

    Args:
        with_edit: takes an edit, a function without arguments, and makes the view that has it, which `with` gives.
    """

    def __init__(self, with_edit: Callable[[Callable[[], None]], Any]) -> None:
        self._with_edit = with_edit

    def __enter__(self) -> Any:
        body = self._body = Body()
        edited = self._with_edit(lambda: body.run(Names(body.look_up)))
        body.skip()
        return edited

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        skipped = self._body.left(kind)
        self._body.forget()
        return skipped
