"""`tracer.iter[...]`, to loop over or to enter: `for step in tracer.iter[:]:`, `with tracer.iter[0:3]:`."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from typing import Any

from nnatomy.blocks.capture import Body, Names
from nnatomy.core.block import Block
from nnatomy.tracing.steps import Steps, _indices


class Iteration:
    """The steps of a generation. In one forward pass, where they are bounded, the calls of modules that it calls several times."""

    def __init__(self, block: Block, calls: Any = None) -> None:
        self._block, self._calls = block, calls

    def __getitem__(self, which: Any) -> Loop:
        if self._calls is None or (isinstance(which, slice) and which.stop is None):
            return Loop(Steps(self._block)[which])
        return Loop(self._over_calls(which))

    def __iter__(self) -> Iterator[int]:
        return self[:]

    def _over_calls(self, which: Any) -> Iterator[int]:
        before = self._calls.get(self._block, 0)
        try:
            for call in _indices(which):
                self._calls[self._block] = call
                yield call
        finally:
            self._calls[self._block] = before


class Loop(Iterator[int]):
    """Steps, one after the other; entered, the body of the `with` is run for each."""

    def __init__(self, steps: Iterator[int]) -> None:
        self._steps = steps

    def __next__(self) -> int:
        return next(self._steps)

    def __enter__(self) -> Any:
        body = self._body = Body()
        code = [one for one in dis.get_instructions(body.frame.f_code) if one.offset > body.frame.f_lasti]
        first = next(one for one in code if one.opname not in ("CACHE", "EXTENDED_ARG", "NOP"))
        stored = first.argval if first.opname.startswith("STORE_") else None
        self._name = stored[0] if isinstance(stored, tuple) else stored  # Python 3.13 may store two at once
        body.skip()
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        body = self._body
        if not body.left(kind):
            return False
        names = Names(body.look_up)
        try:
            for step in self._steps:
                if self._name is not None:
                    names[self._name] = step
                body.run(names)
        finally:
            body.bind(names.bound())
            body.forget()
        return True
