"""What torch and Python keep per thread, taken over from the thread that opened a trace."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch._C import _functorch
from torch._functorch import pyfunctorch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack, _push_mode
from torch.utils import _python_dispatch as dispatch


class ThreadState:
    """What torch and Python keep per thread, as it is where this is made.

    Grad mode, inference mode, autocast, the function and dispatch modes (a default device is one of
    these), the transforms of `torch.func`, the hooks on saved tensors, the number of threads, the CUDA device and
    stream, and the context variables.
    """

    def __init__(self) -> None:
        self.context = contextvars.copy_context()
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.threads = torch.get_num_threads()
        self.autocast: list[tuple[str, torch.dtype]] = []
        if torch._C._is_any_autocast_enabled():
            self.autocast = [
                (device, torch.get_autocast_dtype(device))
                for device in ("cpu", "cuda", "mps", "xpu")
                if torch.is_autocast_enabled(device)
            ]
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.function_modes: list[Any] = _get_current_function_mode_stack()
        self.dispatch_modes: list[Any] = dispatch._get_current_dispatch_mode_stack()
        #: The transforms of `torch.func` that the caller is within, innermost first.
        self.transforms: list[Any] = []
        if _functorch.peek_interpreter_stack() is not None:
            with pyfunctorch.temporarily_clear_interpreter_stack() as transforms:
                self.transforms = transforms
        self.saved_tensors_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.cuda_stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

        modes = [*self.autocast, *self.function_modes, *self.dispatch_modes, *self.transforms]
        others = (self.inference, self.saved_tensors_hooks, self.cuda_stream)
        self._plain = not (modes or any(others))

    def call(self, function: Callable[[], Any]) -> Any:
        """Call `function` in this thread with that state."""
        return self.context.run(self._call, function)

    def _call(self, function: Callable[[], Any]) -> Any:
        if torch.get_num_threads() != self.threads:  # kept per thread by OpenMP
            torch.set_num_threads(self.threads)
        try:
            torch._C._set_grad_enabled(self.grad)
            if self._plain:
                return function()
            with ExitStack() as stack:
                if self.cuda_stream is not None:
                    stack.enter_context(torch.cuda.stream(self.cuda_stream))  # and its device
                if self.inference:
                    stack.enter_context(torch.inference_mode())
                for device, dtype in self.autocast:
                    stack.enter_context(torch.autocast(device, dtype, cache_enabled=self.autocast_cache))
                # Pushed, not entered: to enter one writes to it (a default device notes what to restore).
                for mode in self.function_modes:
                    _push_mode(mode)
                for mode in self.dispatch_modes:
                    dispatch._push_mode(mode)
                if self.saved_tensors_hooks:
                    stack.enter_context(saved_tensors_hooks(*self.saved_tensors_hooks))
                stack.enter_context(pyfunctorch.temporarily_restore_interpreter_stack(self.transforms))
                return function()
        finally:
            while torch._C._len_torch_function_stack():
                torch._C._pop_torch_function_stack()
            while torch._C._len_torch_dispatch_stack():
                dispatch._pop_mode()
