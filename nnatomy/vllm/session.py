"""A session of a client at an engine: traces of its prompts, besides what a session can do with tensors."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.remote.wire import FrameError, from_bytes, unpack
from nnatomy.serve.jobs import Later
from nnatomy.serve.limits import check_put
from nnatomy.serve.policy import Refused
from nnatomy.serve.session import More, Session, Waits
from nnatomy.standardized.accessors import check_fits
from nnatomy.vllm.engine import Generation
from nnatomy.vllm.outputs import to_bytes

#: Fields of `vllm.SamplingParams` that a client may give: numbers, switches, texts, and lists and dicts of these.
FIELDS = frozenset(
    "presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop stop_token_ids ignore_eos "
    "max_tokens min_tokens logprobs prompt_logprobs detokenize skip_special_tokens spaces_between_special_tokens "
    "include_stop_str_in_output logit_bias allowed_token_ids bad_words n".split()
)


class EngineSession(Session):
    """What one client has at the engine."""

    _points: Any
    #: For how long it may wait for the engine, in seconds.
    longest_wait: float
    _waits_since = _asked_at = 0.0

    def __init__(self, model: Any, points: Any, weights: Any, limits: Any, *told: Any) -> None:
        super().__init__(model, points, weights, limits, *told)
        self.longest_wait = limits.command_seconds
        self._shapes: dict[Any, Tensor] = {}

    def handle(self, frame: Any, _: Callable[[], bool] = lambda: False) -> bytes | Later | More | Waits | None:
        # All of a frame at once: within one, no other trace could begin.
        question = unpack(frame)[0].get("q")
        if isinstance(question, list) and question[:1] == ["open"]:
            line = self._points.line
            if self not in line:
                line.append(self)
                self._waits_since = time.monotonic()
            if not self._may_open():
                return Waits(self._may_open)
            line.remove(self)
        return self.carry_out(frame)

    def _may_open(self) -> bool:
        """Whether a trace can be opened now, or refused: as it is one of this session that is open, or it has waited too long."""
        line, holder = self._points.line, self._points.holder
        if (holder is None and line[0] is self) or holder is self:
            return True
        return time.monotonic() > self._waits_since + self.longest_wait

    def close(self) -> None:
        if self in self._points.line:
            self._points.line.remove(self)
        self._leave()
        super().close()

    def _leave(self) -> None:
        if self._points.holder is self:
            self._points.holder = None

    # Traces.

    def _do_open(self, number: Any, kwargs: Any, frozen_norms: Any = False) -> None:
        """What opens a forward pass of a model of Transformers."""
        del number, kwargs, frozen_norms
        raise Refused("this model is on an engine, which is asked for a trace of prompts")

    def _ask_sampling(self, count: Any, given: Any) -> tuple[Any, list[bytes]]:
        """Whether these are sampling parameters. Raises InputError."""
        if type(count) is not int or not 0 < count <= self._limits.tensors:
            raise Refused("sampling parameters are of a number of prompts")
        self._sampling(count, given)
        return None, []

    def _sampling(self, count: int, given: Any) -> list[Any]:
        if not isinstance(given, list) or len(given) != 3:
            raise FrameError("sampling is [max_new_tokens, sampling_params, fields]")
        engine = self._points.model.engine
        known = inspect.signature(engine.vllm.SamplingParams).parameters
        most, params, fields = (self._tensors.read(one) for one in given)
        for one in (fields, *(params if isinstance(params, list) else [params])):
            names = one.keys() if isinstance(one, dict) else ()
            if others := [name for name in names if name in known and name not in FIELDS]:
                raise Refused(f"{others[0]} of vllm.SamplingParams: a server takes {', '.join(sorted(FIELDS))}")
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(one)):
                raise Refused("sampling parameters are no tensors")
        made: list[Any] = engine.sampling(count, most, params, fields)
        return made

    def _ask_open(self, number: Any, lengths: Any, sampling: Any, generates: Any) -> tuple[Any, list[bytes]]:
        """Have a trace of prompts stand at its start: their tokens come in one axis, as the bytes of a tensor.

        Args:
            generates: whether it is a generation, and not one step.
        """
        from nnatomy.vllm.served import EngineForward

        model, points = self._points.model, self._points
        if points.holder is not None:
            whose = "another client's trace" if points.holder is not self else "another trace of this session"
            raise Refused(f"the engine is at {whose}, and runs one at a time: leave its block, or try again later")
        if type(number) is not int or type(generates) is not bool or not self._blobs:
            raise FrameError(
                "a trace is opened by a number, lengths, sampling parameters, a switch, and the bytes of tokens"
            )
        if not isinstance(lengths, list) or not lengths or not all(type(one) is int and one > 0 for one in lengths):
            raise Refused("the lengths of prompts are numbers from 1 on")
        ids = from_bytes(self._blobs.pop(), "int32", [sum(lengths)])
        lists = model.token_lists([one.tolist() for one in ids.split(lengths)])
        if not generates:
            model.check_one_step(lists)
        params = self._sampling(len(lists), sampling)
        tokens = sum(
            min(len(one) + int(each.max_tokens), model.engine.max_model_len)
            for one, each in zip(lists, params, strict=True)
        )
        self._tensors.check_room()
        self.used.add(tokens, tokens * self._parameters)
        model.engine.check_free()
        call = Generation(model.engine, lists, params)
        run = model.engine.run_for(call, generates, None if generates else model.whole(lists))
        self._forwards[number] = EngineForward(points, run, self._check_time, self._begin_step)
        points.holder = self
        return None, []

    def _begin_step(self) -> None:
        """A step of the engine is what a forward pass is elsewhere: it has the time of one command."""
        now = time.monotonic()
        if self.seconds + now - self._asked_at > self._limits.compute_seconds:
            raise Refused(
                f"this session has used up its {self._limits.compute_seconds:,.0f} seconds", "compute_seconds"
            )
        self._began = now

    def _ask_go(self, number: Any, watched: Any, passing: Any = ()) -> tuple[Any, list[bytes]]:
        """Let a trace go on to the first of the points that are watched, or to its end: see `EngineForward.go`."""
        del passing
        forward: Any = self._forward(number)
        self._asked_at, self._shapes = self._began, {}
        tell = self._tensors.tell
        try:
            slot = forward.go(watched)
        except BaseException:
            self._do_end(number)
            raise
        told = forward.progress()
        if slot is None:
            packed = to_bytes(forward.result)
            self._do_end(number)
            if len(packed) > (most := self._limits.frame_bytes - (1 << 20)):
                raise Refused(f"a result of {len(packed):,} bytes; {most:,} are allowed", "frame_bytes")
            return {**told, "result": True}, [packed]
        if "layout" in told:
            told["ids"] = _copied(forward.token_ids(), tell)
        asked = forward.asked_for_here()
        self._shapes = {(name, layer): value for name, layer, value in asked}
        return {
            **told,
            "at": [self._points.numbers[slot.module], slot.kind, slot.call],
            # Copies: the engine writes other clients' values into the same memory.
            "value": _copied(slot.value, tell),
            "read": [[name, layer, tell(value)] for name, layer, value in asked],
        }, []

    def _ask_read(self, number: Any, name: Any, layer: Any) -> tuple[Any, list[bytes]]:
        """The value of a name at the point where a trace stands."""
        forward: Any = self._forward(number)
        value = self._shapes[name, layer] = forward.read(name, layer)
        return self._tensors.tell(value), []

    def _do_write(self, number: Any, name: Any, layer: Any, value: Any) -> None:
        """Put another value in the place of that."""
        forward: Any = self._forward(number)
        new = self._tensors.read(value, own=True)
        if (name, layer) not in self._shapes:
            self._shapes[name, layer] = forward.read(name, layer)
        check_fits(str(name), self._shapes[name, layer], new)  # kernels do not look at shapes
        forward.write(name, layer, new)

    def _do_assign(self, number: Any, value: Any) -> None:
        slot = self._forward(number).slot
        new = self._tensors.read(value, own=True)
        check_put(new, slot.value, self._limits)
        if [_shape(one) for one in pytree.tree_leaves(new)] != [_shape(one) for one in pytree.tree_leaves(slot.value)]:
            raise Refused("what is put in the place of a value of the engine's is of the same shapes and dtypes")
        slot.value = new

    def _do_skip(self, number: Any, value: Any) -> None:
        del number, value
        raise Refused("a module of an engine's model is not skipped: assign its output")

    def _do_end(self, number: Any) -> None:
        super()._do_end(number)
        self._shapes = {}
        if not self._forwards:
            self._leave()

    def _ask_project(self, value: Any) -> tuple[Any, list[bytes]]:
        """The logits of hidden states: see `VllmTransformer.project_on_vocab`."""
        model, hidden = self._points.model, self._tensors.read(value)
        size = 4 * model.vocab_size * (hidden.shape[:-1].numel() if isinstance(hidden, Tensor) else 0)
        if size > self._limits.result_bytes:
            raise Refused(f"logits of {size:,} bytes; {self._limits.result_bytes:,} are allowed", "result_bytes")
        return self._tensors.tell(model.project_on_vocab(hidden)), []


def _copied(value: Any, tell: Callable[[Any], Any]) -> Any:
    return tell(pytree.tree_map_only(Tensor, torch.clone, value))


def _shape(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None
