"""The ranks of a model that is split over processes: how they agree on where they are, and learn of one that fails.

Every rank runs the same block, and the forward pass goes on to the next point on all of them together. So before it does, each
says what it asks for, in a few bytes over a process group of their own: a block that has gone another way, has ended or has
raised is seen there by all, and no rank is left waiting in the model for one that does not come.

What fails inside of the forward pass on one rank alone (it is out of memory) leaves the others waiting in the model. Then
that rank breaks the connections that they wait on, so that they are told at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.nn import Module

from nnatomy.errors import InputError, RanksError

#: What a rank says: it asks for the next point, has come to the block's end, or has left it by an exception.
ASKS, ENDS, FAILS = range(3)
#: For how long a rank whose forward pass has failed waits whether all others' have, in seconds.
GRACE = 3.0
_AGAIN = "The ranks are no longer in step. Start the processes anew."
_LOST = ("Connection closed", "Timed out waiting", "pair closure", "Connection reset", "Broken pipe", "NCCL", "Socket")
_SPLIT_OTHERWISE = (
    ("pp_size", "pipeline parallel"),
    ("dp_size", "FSDP beside tensor parallel"),
    ("ep_size", "expert parallel"),
)
_controls: dict[tuple[int, ...], tuple[Any, Any]] = {}


class Ranks:
    """The ranks that one model is split over, as seen by one of them.

    Args:
        model: the Hugging Face model, loaded with a tensor parallel plan.

    Attributes:
        group: the process group that the model computes in.
        rank: which of them this process is; `size`: how many there are.

    Raises:
        InputError: for a model that is split in other ways, too.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.distributed_config
        for name, what in _SPLIT_OTHERWISE:
            if getattr(config, name, 1) > 1:
                raise InputError(
                    f"The model is {what} ({name}={getattr(config, name)}): nnatomy reads tensor parallel ones alone."
                )
        mesh = model._device_mesh
        self.group = mesh.get_group() if mesh.ndim == 1 else mesh["tp"].get_group()
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.paths: dict[Module, str] = {module: path for path, module in model.named_modules()}
        self.members = tuple(dist.get_process_group_ranks(self.group))
        known = _controls.get(self.members)
        if known is None or known[0] is not dist.group.WORLD:  # (another one, where processes were put together again)
            known = dist.group.WORLD, dist.new_group(list(self.members), backend="gloo")
            _controls[self.members] = known
        self._control = known[1]
        self._count = 0
        self._broken = ""

    @property
    def broken(self) -> str:
        """Why they are no longer in step; "" if they are."""
        return self._broken

    # Agreeing.

    def agree(self, what: int, text: str, where: str = "") -> None:
        """Say where this rank is, and hear where the others are.

        Args:
            what: ASKS, ENDS or FAILS.
            text: what has to be the same on all ranks.
            where: the user's line.

        Raises:
            RanksError: where they are not at the same place, or one has failed; on each of them.
        """
        said = self._exchange([what, crc32(text.encode())])
        if what != FAILS and all(one == said[0] for one in said):
            return
        texts = self._texts(f"{text}{f' at {where}' * bool(where)}")
        failed = [rank for rank, (one, _) in enumerate(said) if one == FAILS]
        others = [f"rank {rank}: {texts[rank]}" for rank in failed or range(self.size)]
        if failed:
            raise RanksError(
                f"The block has been left by an exception, which ends the trace on every rank; on {'; on '.join(others)}"
            )
        raise RanksError(
            f"The ranks are not at the same place of the same block. {'; '.join(others)}. Every rank has to run the same block on "
            "the same prompts, without a branch on the rank around what is read or assigned."
        )

    def same(self, value: Any, what: str) -> None:
        """Raise RanksError if that is not the same on all ranks; on each of them."""
        said = self._exchange([digest(value)])
        if any(one != said[0] for one in said):
            raise RanksError(f"{what} are not the same on every rank: give each rank the same.")

    def share_randomness(self, device: torch.device) -> None:
        """Have all ranks draw the random numbers that the first one would."""
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        said = self._exchange([digest(states)])
        if all(one == said[0] for one in said):
            return
        for state in states:
            dist.broadcast(state, group_src=0, group=self._control)
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, device)

    def _exchange(self, said: list[int]) -> list[list[int]]:
        if self._broken:
            raise RanksError(f"{self._broken} {_AGAIN}")
        self._count += 1
        mine = torch.tensor(said)
        all_said = [torch.empty_like(mine) for _ in range(self.size)]
        self._talk(lambda: dist.all_gather(all_said, mine, group=self._control))
        return [one.tolist() for one in all_said]

    def _texts(self, text: str) -> list[str]:
        raw = text.encode()[:4000]
        sizes = [size for (size,) in self._exchange([len(raw)])]
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else mine[:0]
        texts = [torch.empty_like(mine) for _ in sizes]
        self._talk(lambda: dist.all_gather(texts, mine, group=self._control))
        return [bytes(one[:size].tolist()).decode(errors="replace") for one, size in zip(texts, sizes, strict=True)]

    def _talk(self, call: Any) -> None:
        try:
            call()
        except RuntimeError as error:
            self._broken = f"A rank of this model is gone, or has not come in time ({_first_line(error)})."
            raise RanksError(f"{self._broken} {_AGAIN}") from None

    # Failing.

    def failed(self, error: BaseException) -> BaseException:
        """The forward pass has raised that on this rank: see to it that no other waits for it. What to raise here."""
        self._count += 1
        text = f"{type(error).__name__}: {_first_line(error)}"
        lost = is_lost(error)
        try:
            alike = self._all_failed(text) and not lost
        except RuntimeError:  # the store went with the rank that had it
            alike = False
        if alike:
            return error
        why = self._reasons()
        self.break_off(f"The forward pass failed on one rank ({text}).")
        if not lost:
            return error
        told = f" There: {why}." if why else ""
        return RanksError(
            f"Another rank of this model has failed or is gone, while this one waited for it in the forward pass.{told} {_AGAIN}"
        )

    def break_off(self, why: str) -> None:
        """Have the others no longer wait for this rank in the model."""
        self._broken = self._broken or why
        with suppress(Exception):
            if dist.get_backend(self.group) == "gloo":
                # One that does not come in time closes the connections. (`abort` does not, of gloo.)
                distributed_c10d._set_pg_timeout(timedelta(milliseconds=1), self.group)
                dist.barrier(group=self.group)
            else:
                self.group.abort()

    def _all_failed(self, text: str) -> bool:
        """Whether the forward pass has failed on all ranks: then none waits."""
        store = distributed_c10d._get_default_store()
        store.set(self._key(self.rank), text)
        keys, end = [self._key(rank) for rank in range(self.size)], time.monotonic() + GRACE
        while not store.check(keys):
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def _reasons(self) -> str:
        """What the others have said of why they failed, if they have and it is no consequence."""
        with suppress(RuntimeError):
            store = distributed_c10d._get_default_store()
            others = [rank for rank in range(self.size) if rank != self.rank and store.check([self._key(rank)])]
            said = [(rank, store.get(self._key(rank)).decode()) for rank in others]
            return "; ".join(f"rank {rank}: {text}" for rank, text in said if not any(one in text for one in _LOST))
        return ""

    def _key(self, rank: int) -> str:
        return f"nnatomy/{'-'.join(map(str, self.members))}/{self._count}/{rank}"


def ranks_of(model: Any) -> Ranks | None:
    """The ranks that a model is split over by a tensor parallel plan; None if it is not."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    size = getattr(config, "tp_size", 1) or 1
    return Ranks(model) if size > 1 and getattr(model, "_device_mesh", None) is not None else None


def is_lost(error: BaseException) -> bool:
    """Whether it says that another process is gone, or does not come."""
    return isinstance(error, RuntimeError) and any(one in str(error) for one in _LOST)


def digest(value: Any) -> int:
    """A number that tells tensors, and whatever else has a text, from others."""
    if isinstance(value, Tensor):
        local = value.detach().cpu().contiguous()
        return crc32(bytes(str(tuple(local.shape)), "ascii") + local.flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return digest([*value.items()])
    if isinstance(value, Sequence) and not isinstance(value, str):
        return crc32(b",".join(str(digest(one)).encode() for one in value))
    return crc32(repr(value).encode()) if isinstance(value, (int, float, str, bool, type(None))) else 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
