"""Running a model: calls, traces, generations, on prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from nnatomy.arch_configs import cached_positions, with_cache_called
from nnatomy.core import Trace
from nnatomy.errors import InputError, ModelChangedError
from nnatomy.standardized.inputs import OPTIONS
from nnatomy.standardized.joined_prompts import JoinPrompts
from nnatomy.standardized.parts import Parts
from nnatomy.standardized.positions import untold
from nnatomy.standardized.prompt_trace import Given as GivenPrompts
from nnatomy.standardized.prompt_trace import PromptTrace

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def _at_the_users_line(method: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """The method; where prompts cannot be run, without the frames between it and where that was seen."""

    @wraps(method)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        try:
            return method(*args, **kwargs)
        except (InputError, ModelChangedError) as error:
            raise error.with_traceback(None)  # noqa: B904

    return wrapped


class Running(Parts):
    """A model that runs on prompts."""

    def __call__(self, prompts: Any = None, **kwargs: Any) -> Any:
        """Run the model on prompts, with its lasting edits if it has any; returns what the Hugging Face model returns."""
        inputs = self.prepare(prompts, **kwargs)
        return self.trace(**inputs).run() if self.edits else self.hf_model(**self._prompts.taken(inputs))

    @_at_the_users_line
    def prepare(self, prompts: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The arguments that `prompts` give to the model's forward.

        Args:
            prompts, **kwargs: as in `trace`.

        Returns:
            `input_ids` and `attention_mask` of (batch, seq); `position_ids` too where a batch is padded. (No attention mask
            where `attention_mask=None` is given beside `position_ids`. A forward that takes no mask is not given it.)
        """
        self._check_current()
        return self._prompts.prepare(prompts, kwargs, self.device)

    @_at_the_users_line
    def trace(  # type: ignore[override]
        self, prompts: Any = None, *, early_stop: bool = True, **kwargs: Any
    ) -> Trace:
        """Trace one forward pass: `with model.trace(prompts) as tracer: ...`.

        Without prompts, for several blocks with prompts of their own on one pass: see `Trace.invoke`.

        Args:
            prompts: a string; a chat (a list of dicts with role and content); token ids (a list or 1-D
                tensor); a list of these; a 2-D tensor of ids; or a dict with `input_ids`. Batches are
                padded on the left, so that `[:, -1]` is each prompt's last token. A chat that ends with the assistant's
                message is gone on with; behind any other the assistant's begins.
            early_stop: cancel the forward pass when the block ends. With PEFT's `adapter_names`, give False: it
                takes back what they put on the model only if the call returns.
            **kwargs: `padding_side="right"` pads a batch on the right (so does `model.tokenizer.padding_side`, if it is changed
                after loading); `continue_final_message` and `add_generation_prompt` are the chat template's. All others
                go to the model's forward. Several prompts in one row, told apart by `position_ids` that begin anew, are
                given with `attention_mask=None` and `use_cache=False`, as Transformers has it.

        Raises:
            InputError: if there is nothing to run, or the prompts cannot be run on this model.
            ModelChangedError: if the model is no longer what its names were found on: see `refresh`.
        """

        def call(inputs: dict[str, Any]) -> Callable[[], Any]:
            return partial(self.hf_model, **self._prompts.taken(inputs))

        return self._trace(call, prompts, early_stop, kwargs)

    @_at_the_users_line
    def generate(self, prompts: Any = None, *, early_stop: bool = True, **kwargs: Any) -> Trace:
        """Trace a generation: `with model.generate(prompts, max_new_tokens=5) as tracer: ...`.

        In `for step in tracer.iter[:]:` names mean that step's forward pass. With the KV cache, step 0
        sees the prompt, and each later one the newest token alone. `tracer.result` is what the model's
        `generate` returns; `model.generate(...).run()` generates with no block.

        Args:
            prompts, early_stop: as in `trace`.
            **kwargs: as in `trace`, and those of the model's `generate`.

        Raises:
            InputError: as `trace`, and for prompts padded on the right, behind which nothing can be written.
        """

        given = {**(prompts if isinstance(prompts, Mapping) else {}), **kwargs}
        started, masked = "decoder_input_ids" in given, given.get("attention_mask") is not None

        def call(inputs: dict[str, Any]) -> Callable[[], Any]:
            self._refuse_right_padding(inputs.get("attention_mask"))
            inputs.pop("position_ids", None)  # generate makes its own, for every step
            if not masked and (
                past := cached_positions(inputs)
            ):  # generate is given the prompt with its past
                inputs["attention_mask"] = inputs["attention_mask"][:, past:]
            if not started:
                inputs.pop("decoder_input_ids", None)
            if getattr(self.hf_model.generation_config, "pad_token_id", None) is None:
                inputs.setdefault("pad_token_id", self._prompts.pad_token_id)
            return partial(self.hf_model.generate, **self._prompts.taken(inputs))

        return self._trace(call, prompts, early_stop, kwargs)

    def _trace(
        self,
        call: Callable[[dict[str, Any]], Callable[[], Any]],
        prompts: Any,
        early_stop: bool,
        kwargs: dict[str, Any],
    ) -> Trace:
        given = GivenPrompts()

        def known(inputs: dict[str, Any]) -> Callable[[], Any]:
            given.mask, given.untold = inputs.get("attention_mask"), untold(inputs)
            given.seq = (
                given.mask.shape[1] if isinstance(given.mask, Tensor) and given.mask.ndim == 2 else None
            )
            return call(inputs)

        if prompts is not None or self._prompts.read(kwargs):
            return PromptTrace(
                self, known(self.prepare(prompts, **kwargs)), early_stop=early_stop, given=given
            )
        self._check_current()
        kwargs = with_cache_called(self._prompts.cache, kwargs)
        options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in options}
        joining = JoinPrompts(
            self.hf_model,
            self.prepare,
            lambda inputs: known({**inputs, **others}),
            self._prompts,
            others,
            options,
        )
        return PromptTrace(
            self, lambda: self.prepare(**kwargs), early_stop=early_stop, joining=joining, given=given
        )

    def _refuse_right_padding(self, mask: Any) -> None:
        """An encoder's prompts may be padded on the right."""
        if self._prompts.decoder_start is not None or not isinstance(mask, Tensor) or mask.ndim != 2:
            return
        if len(rows := (mask[:, -1] == 0).nonzero().flatten().tolist()):
            raise InputError(
                f"What is generated would come behind the padding of prompts {', '.join(map(str, rows))}, which are padded on "
                "the right: pad them on the left (tokenizer.padding_side = 'left'), or give a list of prompts."
            )

    @_at_the_users_line
    def scan(  # type: ignore[override]
        self, prompts: Any = None, *, early_stop: bool = True, **kwargs: Any
    ) -> Trace:
        """A trace over fake tensors: shapes without computing, also of a model on the meta device."""
        inputs = self._prompts.taken(self.prepare(prompts, **kwargs))
        return super().scan(early_stop=early_stop, **inputs)
