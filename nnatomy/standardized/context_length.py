"""How long a prompt may be: a model that has a table of positions fails beyond its end, with an error about indices.

Which models have one does not show in their configs: `max_position_embeddings` is the end of GPT-2's table, two more than that of
RoBERTa's, and nothing of the kind in Llama, which computes its positions. So a prompt that is longer than this number is first run
through the first layer, where positions are looked up. That is done once: what runs beyond the number has no such table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from nnatomy.arch_configs import text_config
from nnatomy.errors import InputError, counted

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "context_length")
#: How many of a table's positions may be for something else (RoBERTa's begin behind that of padding).
_SPARE = 8
_DEFAULT = 20  # new tokens, where nothing says how many


class ContextLength:
    """Refuses prompts that are longer than the model's table of positions.

    Args:
        model: the causal language model.
        run: runs it on token ids of (1, seq).
        first_layer: where positions have been looked up when it has run.
    """

    def __init__(self, model: Module, run: Callable[[Tensor], Any], first_layer: Module) -> None:
        config = text_config(model)
        numbers = {name: getattr(config, name, None) for name in _NAMES}
        known = {name: one for name, one in numbers.items() if isinstance(one, int) and one > 0}
        self._name: str = next(iter(known), "")
        self._number: int | None = known.get(self._name)
        self._type = type(model).__name__
        self._run, self._first_layer = run, first_layer
        self._known: dict[int, bool] = {}

    def is_near(self, length: int) -> bool:
        """Whether a prompt of that length may be too long."""
        return self._number is not None and length > self._number - _SPARE

    def check(self, length: int) -> None:
        """Raise InputError if the model fails on prompts of that length, and not on shorter ones."""
        longest = self.shorter_than(length)
        if longest is not None:
            raise InputError(
                f"The prompt is of {counted(length, 'token')}, and {self.says(longest)}: give fewer, such as ids[..., -{longest}:], "
                "or the parts one after the other."
            )

    def shorter_than(self, length: int) -> int | None:
        """How many positions the model has, if these are fewer; None too where it fails for a reason of its own, which it says."""
        number = self._number
        if number is None or not self.is_near(length) or self._runs_on(length):
            return None
        shorter = range(min(number, length - 1), number - _SPARE, -1)
        return next((one for one in shorter if one > 0 and self._runs_on(one)), None)

    def says(self, longest: int) -> str:
        """In words, what the model has."""
        return f"{self._type} has no positions for more than {longest} ({self._name}={self._number} in its config)"

    def end_of(self, length: int, arguments: Mapping[str, Any], config: Any) -> tuple[int, str] | None:
        """How many positions there are for a generation that may need more, and that in words.

        (A step that needs more is refused when it comes: the generation may have ended before.)

        Args:
            length: of the prompts.
            arguments: of `generate`.
            config: the model's own for it, if the arguments have none.
        """
        config = arguments.get("generation_config") or config
        new, most = (arguments.get(name) or getattr(config, name, None) for name in ("max_new_tokens", "max_length"))
        if isinstance(new, int):
            most = length + new
        # The newest token is not put in.
        longest = self.shorter_than((most if isinstance(most, int) else length + _DEFAULT) - 1)
        return None if longest is None else (longest, self.says(longest))

    def _runs_on(self, length: int) -> bool:
        if any(one >= length and runs for one, runs in self._known.items()):
            return True
        if any(one > (self._number or 0) and runs for one, runs in self._known.items()):
            return True  # so it has no table
        if length not in self._known:
            self._known[length] = self._passes_first_layer(length)
        return self._known[length]

    def _passes_first_layer(self, length: int) -> bool:
        hook = self._first_layer.register_forward_hook(_stop)
        try:
            with torch.no_grad(), _InBounds():  # type: ignore[no-untyped-call]
                self._run(torch.ones(1, length, dtype=torch.long))
        except _Stop:
            return True
        except torch.OutOfMemoryError:
            return True  # that is for the model to say
        except (IndexError, RuntimeError, ValueError) as error:
            return "allocate" in str(error)
        finally:
            hook.remove()
        return True


class _Stop(BaseException):
    """Ends the pass behind the first layer."""


def _stop(*_: Any) -> None:
    raise _Stop


class _InBounds(TorchDispatchMode):
    """Looks at indices before they are used: on a GPU those beyond a table's end leave the process without that GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", None)
        if packet is torch.ops.aten.embedding:
            _check(args[1], args[0].shape[0])
        elif packet in (torch.ops.aten.index_select, torch.ops.aten.gather):
            _check(args[2], args[0].shape[args[1]])
        elif packet is torch.ops.aten.index:
            for axis, index in enumerate(args[1]):
                if index is not None and index.dtype != torch.bool:
                    _check(index, args[0].shape[axis])
        return func(*args, **(kwargs or {}))


def _check(index: Tensor, size: int) -> None:
    if index.numel() and int(index.max()) >= size:
        raise IndexError(f"index {int(index.max())} of {size}")
