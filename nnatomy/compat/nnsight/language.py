"""`LanguageModel`: a Hugging Face model under nnsight's names, and under the standard names."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from transformers import AutoTokenizer

from nnatomy.compat.nnsight.envoy import Aliases, Naming
from nnatomy.compat.nnsight.errors import as_value_error
from nnatomy.compat.nnsight.generator import Generator, StreamedTokens
from nnatomy.compat.nnsight.model import _UNSET, NNsight, _used
from nnatomy.compat.nnsight.tracer import as_tracer
from nnatomy.core.frames import warn
from nnatomy.errors import InputError, UsageError
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.loading import locate

#: What a model is loaded by there, and makes no difference here.
_IDLE = ("dispatch", "task", "meta_buffers", "import_edits", "allow_dispatch")


class LanguageModel(NNsight, StandardizedTransformer):
    """A Hugging Face model under nnsight's names. It is a `StandardizedTransformer`, whose names it has as well.

    Args:
        model: an id, a folder, `demo:gpt2`, or a loaded model.
        tokenizer: for a loaded model.
        rename, envoys: as of `NNsight`.
        automodel: the class whose `from_pretrained` loads it.
        **kwargs: those of `StandardizedTransformer`, and of `from_pretrained`. `dispatch` makes no difference: the model is loaded.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        rename: Aliases | None = None,
        envoys: Any = _UNSET,
        automodel: Any = None,
        **kwargs: Any,
    ) -> None:
        self._naming = Naming(rename, type(self).envoys if envoys is _UNSET else envoys)
        for name in _IDLE:
            kwargs.pop(name, None)
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        if automodel is not None and not isinstance(model, Module):
            tokenizer = tokenizer or model
            own: dict[str, Any] = {
                key: kwargs.pop(key) for key in ("validate", "allow_failures", "arch_config") if key in kwargs
            }
            model, kwargs = automodel.from_pretrained(model, **kwargs), own
        kwargs.setdefault("allow_failures", True)
        options = kwargs.pop("tokenizer_kwargs", None) or {}
        if options and tokenizer is None and not isinstance(model, Module):
            tokenizer = AutoTokenizer.from_pretrained(locate(model), **options)
        StandardizedTransformer.__init__(self, model, tokenizer, **kwargs)
        if "padding_side" in options:
            self.tokenizer.padding_side = options["padding_side"]

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def _read(self) -> None:
        super()._read()
        self._name_root()

    def _view_of(self, module: Module) -> Any:
        return self._module_view(module, self.paths([module])[module])

    @property
    def generator(self) -> Generator:
        """What is generated: `.output`, and `.streamer.output`, each step's token."""
        return Generator(self)

    def trace(self, *prompts: Any, remote: Any = False, trace: bool = True, **kwargs: Any) -> Any:
        """`with model.trace(prompt) as tracer:`; with `trace=False`, what the model returns."""
        kwargs = _used(kwargs)
        if not trace:
            return self(*_one(prompts), **kwargs)
        if kwargs.pop("max_new_tokens", 1) != 1:
            warn("model.trace(..., max_new_tokens=...): a trace is one forward pass. For more, model.generate(...).")
        with as_value_error(InputError):
            opened = StandardizedTransformer.trace(self, *_one(prompts), remote=_server(remote), **kwargs)
        return as_tracer(opened)

    def generate(self, *prompts: Any, remote: Any = False, **kwargs: Any) -> Any:
        """`with model.generate(prompt, max_new_tokens=3) as tracer:`."""
        kwargs = _used(kwargs)
        if (
            "streamer" not in kwargs
            and (kwargs.get("num_beams") or self.hf_model.generation_config.num_beams or 1) == 1
        ):
            kwargs["streamer"] = streamer = StreamedTokens()
        else:
            streamer = None
        with as_value_error(InputError):
            opened = as_tracer(StandardizedTransformer.generate(self, *_one(prompts), remote=_server(remote), **kwargs))
        opened.streamer = streamer
        return opened

    def scan(self, *prompts: Any, **kwargs: Any) -> Any:
        """The same over fake tensors."""
        return as_tracer(StandardizedTransformer.scan(self, *_one(prompts), **kwargs))

    def __call__(self, *prompts: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return StandardizedTransformer.__call__(self, *_one(prompts), **kwargs)


def _one(prompts: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(prompts) > 1:
        raise UsageError("Give several prompts as a list: model.trace([prompt, other]).")
    return prompts


def _server(remote: Any) -> Any:
    return False if remote in (None, "local") else remote


class TransformersModel(LanguageModel):
    """nnsight's newer name of it."""
