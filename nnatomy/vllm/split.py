"""Tensor parallelism: values that each process has a part of are gathered when they are read, and split when they are put.

All processes run the same script (`torchrun`), and so the same block, in step: each that reads takes part in the gathering.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnatomy.core.points import Slot
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.places import Place
from nnatomy.vllm.run import Once


def ranks() -> int:
    """Over how many processes the engine's model is split."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def all_of(good: bool) -> bool:
    """Whether that is so in all processes."""
    if ranks() == 1:
        return good
    from vllm.distributed import get_tp_group

    found = torch.tensor([int(good)])
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return bool(found.item())


@dataclass(frozen=True)
class SplitPlace(Place):
    """A place of which each process has a part.

    Attributes:
        part: where this process's is.
        axis: along which it is split.
        copies: how many processes have the same part: of shared keys and values, where there are fewer heads than processes.
    """

    part: Place = field(kw_only=True)
    axis: int = field(kw_only=True)
    copies: int = 1

    @classmethod
    def of(cls, part: Any, axis: int, copies: int = 1) -> SplitPlace:
        """That of a part."""
        return cls(part.module, part.kind, part.only_read, part=part, axis=axis, copies=copies)

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        from vllm.distributed import get_tp_group

        mine = self.part.read(slot, layout).contiguous()
        whole = get_tp_group().all_gather(mine, self.axis % mine.ndim)
        if self.copies == 1:
            return whole
        size = mine.shape[self.axis]
        parts = whole.split(size, self.axis)
        return torch.cat(parts[:: self.copies], self.axis)

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> Once | None:
        from vllm.distributed import get_tensor_model_parallel_rank

        rank = int(get_tensor_model_parallel_rank()) // self.copies
        return self.part.write(slot, layout, new.chunk(ranks() // self.copies, self.axis)[rank].contiguous())
