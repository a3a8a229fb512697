"""The commands and questions of a session: each a method, `_do_NAME` or `_ask_NAME`, whose arguments are a client's."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache

from nnatomy.methods.frozen_norms import FrozenNorms
from nnatomy.remote.wire import FrameError, from_bytes, layout_of, to_bytes
from nnatomy.serve import policy
from nnatomy.serve.forward import Forward, Points
from nnatomy.serve.graph import Graph
from nnatomy.serve.limits import Limits, Used, check_put, check_size
from nnatomy.serve.policy import Refused
from nnatomy.serve.tensors import Failed, Tensors, Weights

#: The arguments of a forward pass that a client may give.
ARGUMENTS = frozenset(
    "input_ids attention_mask position_ids inputs_embeds token_type_ids past_key_values cache use_cache cache_position "
    "logits_to_keep labels return_dict".split()
)


#: How many times larger what a module gives may be than what it is given, where a client says what it gives.
_WIDER = 16


class Commands:
    """What a client can have done with what it holds. No command writes to the model's parameters, or gives them gradients."""

    def __init__(self, model: Any, points: Points, weights: Weights, limits: Limits, hello: dict[str, Any]) -> None:
        self._points, self._weights, self._limits, self._hello = points, weights, limits, hello
        new_cache = partial(DynamicCache, config=model.config.get_text_config(decoder=True))
        self._tensors = Tensors(weights, limits, model.device, new_cache)
        self.used = Used(limits)
        self._graph = Graph(weights, limits.graph_bytes)
        self._graph.check = self._check_time
        self._began = time.monotonic()
        self._parameters = sum(one.numel() for one in weights.numbered)
        self._forwards: dict[int, Forward] = {}
        self._blobs: list[Any] = []
        self._grad = True
        self._failed: Failed | None = None

    @property
    def held_bytes(self) -> int:
        """Of all tensors that the session has, and of what is kept for their gradients."""
        return self._tensors.bytes + self._graph.bytes

    def _check_time(self) -> None:
        """Raise Refused if the command that is at work has had its time."""
        if time.monotonic() - self._began > self._limits.command_seconds:
            raise Refused(
                f"a command that computes for more than {self._limits.command_seconds:g} seconds", "command_seconds"
            )

    # Tensors.

    def _do_put(self, number: Any, dtype: Any, shape: Any, order: Any, requires_grad: Any = False) -> None:
        """A tensor of the client's, whose axes lie in memory in that order."""
        if not self._blobs:
            raise FrameError("the bytes of a tensor are missing")
        tensor = from_bytes(self._blobs.pop(), dtype, shape).to(self._tensors._device)
        if sorted(order) != list(range(tensor.ndim)):
            raise FrameError("an order of axes names each once")
        tensor = tensor.permute([order.index(axis) for axis in range(tensor.ndim)])
        self._tensors.keep(number, tensor.requires_grad_(bool(requires_grad)))

    def _do_drop(self, numbers: Any) -> None:
        for number in numbers:
            self._tensors.drop(number)

    def _do_grad(self, on: Any) -> None:
        self._grad = bool(on)

    def _do_clear(self) -> None:
        """What has failed so far is not to be told."""
        self._failed = None

    def _ask_hello(self) -> tuple[Any, list[bytes]]:
        return self._hello, []

    def _ask_sync(self) -> tuple[Any, list[bytes]]:
        return {
            "bytes": self._tensors.bytes,
            "tensors": sum(1 for _ in self._tensors),
            "objects": self._tensors.objects,
        }, []

    def _ask_fetch(self, numbers: Any, leave_out: Any = False) -> tuple[Any, list[bytes]]:
        """The elements of tensors.

        Args:
            leave_out: those whose own command has failed, of which nothing is told then.
        """
        found = [self._tensors.tensor_or_none(one) if leave_out else self._tensors.tensor(one) for one in numbers]
        tensors = [one for one in found if one is not None]
        size, most = (
            sum(one.numel() * one.element_size() for one in tensors),
            self._limits.frame_bytes - (1 << 20),
        )
        if size > most:
            raise Refused(f"{size:,} bytes at once; {most:,} are allowed: ask for less", "frame_bytes")
        return [None if one is None else layout_of(one) for one in found], [to_bytes(one) for one in tensors]

    def _ask_item(self, number: Any) -> tuple[Any, list[bytes]]:
        value = self._tensors.tensor(number).item()
        return ({"complex": [value.real, value.imag]} if isinstance(value, complex) else value), []

    def _do_op(self, name: Any, args: Any, kwargs: Any, numbers: Any) -> None:
        made = [leaf for leaf in pytree.tree_leaves(self._op(name, args, kwargs)) if isinstance(leaf, Tensor)]
        if not isinstance(numbers, list) or len(numbers) != len(made):
            raise Refused(f"{name} gives {len(made)} tensors")
        for number, tensor in zip(numbers, made, strict=True):
            if number is not None:
                self._tensors.keep(number, tensor)

    def _ask_op(self, name: Any, args: Any, kwargs: Any) -> tuple[Any, list[bytes]]:
        """The same, where the client cannot know the result's shape."""
        return self._tensors.tell(self._op(name, args, kwargs)), []

    def _op(self, name: Any, args: Any, kwargs: Any) -> Any:
        op = policy.overload(name)
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise Refused("the arguments of a function are a list and a dict")
        args = [self._tensors.read(one) for one in args]
        kwargs = {key: self._tensors.read(one) for key, one in kwargs.items()}
        policy.check(op, args, kwargs)
        for target in policy.written(op, args, kwargs):
            self._tensors.check_own(target)
        self.used.add(0, check_size(op, args, kwargs, self._limits, self._tensors.bytes))
        return op(*args, **kwargs)

    # Gradients.

    def _do_needs(self, number: Any, on: Any) -> None:
        self._tensors.own(number).requires_grad_(bool(on))

    def _do_retain(self, number: Any) -> None:
        self._tensors.own(number).retain_grad()

    def _do_backward(self, number: Any, gradient: Any, retain: Any, create: Any, inputs: Any) -> None:
        """Into what this session holds, and never into the parameters, which all clients share."""
        if inputs is None:
            into = [one for one in self._tensors if one.requires_grad and (one.is_leaf or one.retains_grad)]
            into = [one for one in into if not self._tensors._weights.share(one)]
        else:
            into = [self._tensors.own(one) for one in inputs]
        gradient = self._tensors.read(gradient)
        each = list({id(one): one for one in into}.values())
        tensor = self._tensors.tensor(number)
        if each:
            torch.autograd.backward(tensor, gradient, retain_graph=retain, create_graph=bool(create), inputs=each)
        elif not tensor.requires_grad:
            raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")

    def _ask_gradient(self, number: Any) -> tuple[Any, list[bytes]]:
        return self._tensors.tell(self._tensors.own(number).grad), []

    def _grads(self, outputs: Any, inputs: Any, given: Any, retain: Any, create: Any, unused: bool) -> tuple[Any, ...]:
        return torch.autograd.grad(
            [self._tensors.tensor(one) for one in outputs],
            [self._tensors.own(one) for one in inputs],
            None if given is None else [self._tensors.read(one) for one in given],
            retain_graph=retain,
            create_graph=bool(create),
            allow_unused=unused,
        )

    def _do_grads(self, outputs: Any, inputs: Any, given: Any, retain: Any, create: Any, numbers: Any) -> None:
        grads = self._grads(outputs, inputs, given, retain, create, unused=False)
        for number, grad in zip(numbers, grads, strict=True):
            self._tensors.keep(number, grad)

    def _ask_grads(self, outputs: Any, inputs: Any, given: Any, retain: Any, create: Any) -> tuple[Any, list[bytes]]:
        return self._tensors.tell(list(self._grads(outputs, inputs, given, retain, create, unused=True))), []

    # Forward passes.

    def _do_open(self, number: Any, kwargs: Any, frozen_norms: Any = False) -> None:
        """Have a forward pass stand at its start.

        Args:
            frozen_norms: whether no gradient goes through what a norm divides by, see `FrozenNorms`.
        """
        if type(frozen_norms) is not bool:
            raise Refused("frozen_norms is true or false")
        if type(number) is not int or number in self._forwards or len(self._forwards) >= self._limits.forwards:
            raise Refused(
                f"a session has {self._limits.forwards} forward passes open at most, each of a number of its own",
                "forwards",
            )
        if not isinstance(kwargs, dict) or not kwargs.keys() <= ARGUMENTS:
            raise Refused(f"the arguments of a forward pass are {', '.join(sorted(ARGUMENTS))}")
        arguments = {key: self._tensors.read(one, own=True) for key, one in kwargs.items()}
        self._check_tokens(arguments)
        with FrozenNorms() if frozen_norms else nullcontext():
            call = partial(self._points.root, **arguments)
            self._forwards[number] = Forward(self._points, call, self._limits.held_bytes, self._check_time)

    def _check_tokens(self, arguments: dict[str, Any]) -> None:
        embeds = arguments.get("inputs_embeds")
        new = [embeds.shape[:-1].numel()] if isinstance(embeds, Tensor) and embeds.ndim > 1 else []
        new += [one.numel() for key, one in arguments.items() if isinstance(one, Tensor) and key != "inputs_embeds"]
        tokens = max(new, default=0)
        past = max((_positions(one) for one in arguments.values() if isinstance(one, Cache)), default=0)
        if tokens + past > self._limits.tokens:
            raise Refused(f"{tokens + past:,} tokens in a forward pass; {self._limits.tokens:,} are allowed", "tokens")
        self._tensors.check_room()
        self.used.add(tokens, tokens * self._parameters)

    def _forward(self, number: Any) -> Forward:
        if type(number) is not int or number not in self._forwards:
            raise Refused(f"no forward pass {number!r:.40} is open")
        return self._forwards[number]

    def _ask_go(self, number: Any, watched: Any, passing: Any = ()) -> tuple[Any, list[bytes]]:
        """Let a forward pass go on to the first of the points that are watched, or to its end."""
        forward, tell = self._forward(number), self._tensors.tell
        try:
            slot = forward.go(watched, list(passing))
        finally:
            self._weights.put_back()
        passed = [{**told, "value": tell(value)} for told, value in forward.passed]
        forward.passed = []
        if slot is not None:
            return {
                **forward.told(slot),
                "value": tell(slot.value),
                "passed": passed,
                **forward.progress(),
            }, []
        answer = {"result": tell(forward.result), "passed": passed, **forward.progress()}
        self._do_end(number)
        return answer, []

    def _do_assign(self, number: Any, value: Any) -> None:
        """Put another value where a forward pass stands."""
        slot = self._forward(number).slot
        new = self._tensors.read(value, own=True)
        check_put(new, slot.value, self._limits)
        slot.value = new

    def _do_skip(self, number: Any, value: Any) -> None:
        """Do not run the module at whose input a forward pass stands: this is its output."""
        slot = self._forward(number).slot
        if slot.kind != "input":
            raise Refused("a module is skipped at its input")
        new = self._tensors.read(value, own=True)
        check_put(new, slot.value, self._limits, _WIDER)
        slot.skip(new)

    def _do_end(self, number: Any) -> None:
        if (forward := self._forwards.pop(number, None)) is not None:
            forward.end()


def _positions(cache: Cache) -> int:
    """Of how many positions keys are in a cache, of all rows."""
    keys = [one for layer in cache.layers if isinstance(one := getattr(layer, "keys", None), Tensor)]
    return max((one.shape[0] * one.shape[-2] for one in keys if one.ndim > 2), default=0)
