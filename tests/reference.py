"""What plain PyTorch hooks see and do: the reference that accessors are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


def first(value: Any) -> Tensor:
    """The tensor in a module's output."""
    return value if isinstance(value, Tensor) else value[0]


def in_memory_of_its_own(model: nn.Module) -> nn.Module:
    """The model, with its weights no longer where a file is mapped: at other addresses (not at multiples of 64) the
    mathematics library adds up in another order on some processors, and the last bits differ."""
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()
    return model


def hooked(model: nn.Module, call: Callable[[], Any], points: dict[Any, tuple[nn.Module, str]]) -> dict[Any, Tensor]:
    """Run `call` and return the hidden states at each named (module, "input" or "output")."""
    seen: dict[Any, Tensor] = {}
    handles = []
    for name, (module, kind) in points.items():

        def pre(_: nn.Module, args: Any, kwargs: Any, name: Any = name) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        def post(_: nn.Module, __: Any, output: Any, name: Any = name) -> None:
            seen[name] = first(output).clone()  # as it is now: Falcon changes one in place

        handles.append(
            module.register_forward_pre_hook(pre, with_kwargs=True)
            if kind == "input"
            else module.register_forward_hook(post)
        )
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def reads_what_hooks_see(
    model: Any, ids: Tensor, points: dict[Any, tuple[nn.Module, str]]
) -> tuple[dict[Any, Tensor], Tensor]:
    """Assert that a view reads at points named ("layers_output", 3) what hooks see, and the logits; both, of the plain model."""
    hf = model.hf_model
    with torch.no_grad():
        plain = hf(ids).logits
        expected = hooked(hf, lambda: hf(ids), points)
        with model.trace(ids):
            seen = {(name, i): getattr(model, name)[i] for name, i in expected}
            logits = model.logits
    assert torch.equal(logits, plain)
    assert seen.keys() == points.keys()
    assert all(torch.equal(seen[point], value) for point, value in expected.items())
    return expected, plain


def edited(call: Callable[[], Any], module: nn.Module, kind: str, edit: Edit) -> Any:
    """Run `call` with the hidden states at one point replaced by `edit` of them."""

    def pre(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def post(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, list):
            return [edit(output[0]), *output[1:]]
        return edit(output) if isinstance(output, Tensor) else (edit(output[0]), *output[1:])

    if kind == "input":
        handle = module.register_forward_pre_hook(pre, with_kwargs=True)
    else:
        handle = module.register_forward_hook(post)
    try:
        with torch.no_grad():
            return call()
    finally:
        handle.remove()
