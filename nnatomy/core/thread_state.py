"""What torch and Python keep per thread, taken over from the thread that opened a trace."""

import contextvars
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
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

    Attributes:
        grad: whether gradients are recorded.
        transforms: the transforms of `torch.func` that the caller is within, innermost first.
    """

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.transforms: list[Any] = []
        self._context = contextvars.copy_context()
        self._threads = torch.get_num_threads()
        #: What the other thread is to be within, outermost first.
        self._within: list[Callable[[], AbstractContextManager[Any]]] = []
        within = self._within.append
        if torch.cuda.is_initialized():
            within(partial(torch.cuda.stream, torch.cuda.current_stream()))  # and its device
        if torch.is_inference_mode_enabled():
            within(torch.inference_mode)
        for device in ("cpu", "cuda", "mps", "xpu") if torch._C._is_any_autocast_enabled() else ():
            if torch.is_autocast_enabled(device):
                dtype, cache = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
                within(partial(torch.autocast, device, dtype, cache_enabled=cache))
        if hooks := torch._C._autograd._top_saved_tensors_default_hooks(False):
            within(partial(saved_tensors_hooks, *hooks))
        if _functorch.peek_interpreter_stack() is not None:
            with pyfunctorch.temporarily_clear_interpreter_stack() as self.transforms:
                pass
            within(partial(pyfunctorch.temporarily_restore_interpreter_stack, self.transforms))
        self._function_modes = _get_current_function_mode_stack()
        self._dispatch_modes = dispatch._get_current_dispatch_mode_stack()

    def call(self, function: Callable[[], Any]) -> Any:
        """Call `function` in this thread with that state."""
        return self._context.run(self._call, function)

    def _call(self, function: Callable[[], Any]) -> Any:
        if torch.get_num_threads() != self._threads:  # kept per thread by OpenMP
            torch.set_num_threads(self._threads)
        torch._C._set_grad_enabled(self.grad)
        try:
            with ExitStack() as stack:
                for manager in self._within:
                    stack.enter_context(manager())
                # Pushed, not entered: to enter one writes to it (a default device notes what to restore).
                for mode in self._function_modes:
                    _push_mode(mode)
                for mode in self._dispatch_modes:
                    dispatch._push_mode(mode)
                return function()
        finally:  # also those that the model's own code has left
            while torch._C._len_torch_function_stack():
                torch._C._pop_torch_function_stack()
            while torch._C._len_torch_dispatch_stack():
                dispatch._pop_mode()
