"""Reading some positions of many prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from nnatomy.methods.activations import Activations, Key
from nnatomy.methods.by_length import TOKENS, batches
from nnatomy.methods.tokens import Tokens, arguments_of
from nnatomy.names import Name
from nnatomy.standardized import LayerAccessor, StandardizedTransformer
from nnatomy.standardized.accessors import read_together

#: Names, each with its layers.
Wanted = Sequence[tuple[LayerAccessor, Sequence[int]]]


#: How many prompts at most are run alone, to see whether padding shows in their values. (Where attention is to the best keys
#: only, it shows in some prompts and in others not.)
_PROBES = 8


@dataclass(frozen=True)
class Selection:
    """A prompt, and which of its positions are wanted."""

    tokens: Tokens
    positions: list[int]

    @property
    def length(self) -> int:
        """How many tokens are padded to those of other prompts."""
        return len(self.tokens.ids)


@dataclass(frozen=True)
class Reader:
    """Reads what is wanted of a model."""

    model: StandardizedTransformer
    wanted: Wanted
    batch_size: int | None
    dtype: torch.dtype | None
    device: torch.device | str

    def read(self, prompts: Sequence[Selection], done: Callable[[int], Any]) -> Activations:
        """The activations of some prompts; `done` is told how many more are."""
        offsets = [0, *accumulate(len(prompt.positions) for prompt in prompts)]
        keys = [(accessor.name, layer) for accessor, layers in self.wanted for layer in layers]
        tensors: dict[Key, Tensor] = {}
        for batch in self._batches(prompts):
            rows = torch.tensor([row for i in batch for row in range(offsets[i], offsets[i + 1])])
            for key, values in zip(keys, self.run([prompts[i] for i in batch]), strict=True):
                if key not in tensors:
                    tensors[key] = values.new_empty((offsets[-1], *values.shape[1:]))
                tensors[key][rows.to(values.device)] = values
            done(len(batch))
        token_ids = [prompt.tokens.read[at] for prompt in prompts for at in prompt.positions]
        return Activations(tensors, torch.tensor(offsets), torch.tensor(token_ids))

    def run(self, batch: Sequence[Selection]) -> list[Tensor]:
        """What is wanted, of one forward pass: for each name and layer the rows of all prompts."""
        starts = [0] * len(batch)  # an encoder's prompts are padded on the right, a decoder's not at all
        if batch[0].tokens.decoder is None:
            seq = max(prompt.length for prompt in batch)
            starts = [seq - prompt.length for prompt in batch]
        rows, columns = torch.tensor(
            [(b, starts[b] + at) for b, prompt in enumerate(batch) for at in prompt.positions]
        ).unbind(1)

        def keep(value: Tensor, _: Name) -> Tensor:
            chosen = value[rows.to(value.device), columns.to(value.device)]
            return chosen.to(self.device, self.dtype)

        with self.model.trace(arguments_of([prompt.tokens for prompt in batch]), padding_side="left", use_cache=False):
            found = read_together(self.wanted, keep)
        return list(chain.from_iterable(found))

    def padding_shows(self, longest: Selection, shorter: Sequence[Selection]) -> bool:
        """Whether the values of shorter prompts are others beside the longest than alone.

        Recurrent mixers and convolutions run over the padding, and some models take positions or masks of their own
        from it. What is less than a thousandth, or four times what the model's dtype resolves, is rounding.
        """
        dtype: Any = self.model.steps_of.dtype
        tolerance = max(1e-3, 4 * torch.finfo(dtype).eps)
        count = max(1, (self.batch_size or TOKENS // longest.length) - 1)
        for start in range(0, len(shorter), count):
            some = [longest, *shorter[start : start + count]]
            together = [values.split([len(one.positions) for one in some]) for values in self.run(some)]
            for i, prompt in enumerate(some[1:], 1):
                for padded, alone in zip(together, self.run([prompt]), strict=True):
                    if float((padded[i] - alone).norm()) > tolerance * float(alone.norm()):
                        return True
        return False

    def _batches(self, prompts: Sequence[Selection]) -> Iterator[list[int]]:
        """The indices of the prompts of each batch, of one length as a decoder reads them."""
        of_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            of_length.setdefault(len(prompt.tokens.decoder or ()), []).append(i)
        for group in of_length.values():
            for batch in self._by_length([prompts[i] for i in group]):
                yield [group[i] for i in batch]

    def _by_length(self, prompts: Sequence[Selection]) -> Iterator[list[int]]:
        """The same of these alone: the longest first, of one length where padding shows."""
        lengths = [prompt.length for prompt in prompts]
        of_length: dict[int, list[int]] = {}
        for i in sorted(range(len(prompts)), key=lambda i: -lengths[i]):
            of_length.setdefault(lengths[i], []).append(i)
        longest, *shorter = (prompts[group[0]] for group in of_length.values())
        probes = shorter[:: -max(1, -(-len(shorter) // _PROBES))]
        if self.batch_size == 1 or (self.model.takes_padding and not self.padding_shows(longest, probes)):
            yield from batches(lengths, self.batch_size)
            return
        for group in of_length.values():
            for part in batches([lengths[i] for i in group], self.batch_size):
                yield [group[i] for i in part]
