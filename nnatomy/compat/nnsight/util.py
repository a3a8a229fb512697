"""`nnsight.util` as far as scripts use it."""

from __future__ import annotations

from typing import Any

from torch.nn import Module


class WrapperModule(Module):
    """A module that gives what it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The one argument, or all."""
        if len(args) == 1 and not kwargs:
            return args[0]
        return args or kwargs
