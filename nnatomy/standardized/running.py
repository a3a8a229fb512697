"""Running a model: calls, traces, generations, on prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, overload

from torch import Tensor

from nnatomy.arch_configs import cached_positions, with_cache_called
from nnatomy.core.scan import on_fake_tensors
from nnatomy.errors import InputError, ModelChangedError
from nnatomy.standardized.inputs import OPTIONS, is_batch
from nnatomy.standardized.joined_prompts import JoinPrompts
from nnatomy.standardized.kept_state import copies_of_states, states_in, undone_unless_it_returns
from nnatomy.standardized.keywords import PIXELS, SOUND
from nnatomy.standardized.media_kinds import MEDIA
from nnatomy.standardized.parts import Parts
from nnatomy.standardized.positions import untold
from nnatomy.standardized.prompt_trace import Given as GivenPrompts
from nnatomy.standardized.prompt_trace import PromptTrace
from nnatomy.standardized.real_numbers import RealWholeNumbers
from nnatomy.tracing import Trace
from nnatomy.whole_number import count_of

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
        self._check_used(prompts, kwargs)
        inputs = self.prepare(prompts, **kwargs)
        return self._trace(self._forward, None, True, inputs).run() if self.edits else self._forward(inputs)()

    def _forward(self, inputs: dict[str, Any]) -> Callable[[], Any]:
        return self._shards.in_order(partial(self.hf_model, **self._prompts.taken(inputs)))

    def _check_used(self, prompts: Any, kwargs: dict[str, Any], generating: bool = False) -> set[str]:
        """The names of what is given. Raises InputError if the model makes no use of one."""
        by_tokenizer = getattr(self.tokenizer, "model_input_names", ())
        beside = set(prompts).difference(by_tokenizer) if isinstance(prompts, Mapping) else set[str]()
        given = beside.union(kwargs).difference(OPTIONS)
        self._keywords.check(given, ("prompts", "early_stop", *OPTIONS), generating)
        return given

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
        self, prompts: Any = None, *, early_stop: bool = True, remote: bool | str = False, **kwargs: Any
    ) -> Trace:
        """Trace one forward pass: `with model.trace(prompts) as tracer: ...`.

        Without prompts, for several blocks with prompts of their own on one pass: see `Trace.invoke`.

        Args:
            prompts: a string; a chat (a list of dicts with role and content); token ids (a list or 1-D
                tensor); a list of these; a 2-D tensor of ids; or a dict with `input_ids`. Batches are
                padded on the left, so that `[:, -1]` is each prompt's last token. A chat that ends with the assistant's
                message is gone on with; behind any other the assistant's begins.
            early_stop: cancel the forward pass when the block ends. (Not where a cache of yours is among the arguments: that is
                left as a whole pass leaves it, or, where the pass fails or is stopped, as it was.) With PEFT's
                `adapter_names`, give False: it takes back what they put on the model only if the call returns.
            remote: have the forward pass run by the server that `model.server` (or NNATOMY_SERVER) says, which has to have the same
                weights; a text is the model's name there.
            **kwargs: `padding_side="right"` pads a batch on the right (so does `model.tokenizer.padding_side`, if it is changed
                after loading); `prepend_bos` says whether a text begins with the tokenizer's token for that, which it
                puts as it likes by default (`to_tokens`); `continue_final_message` and `add_generation_prompt` are the chat
                template's; `images`, `videos` and `audio` are read by `model.processor`, one, or a list in the order of their
                places in the prompts (docs/images.md). All others go to the model's forward, which has to make use of them.
                Several prompts in one row, told apart by `position_ids` that begin anew, are given with `attention_mask=None`
                and `use_cache=False`, as Transformers has it.

        Raises:
            InputError: if there is nothing to run, the prompts cannot be run on this model, or it makes no use of an argument.
            ModelChangedError: if the model is no longer what its names were found on: see `refresh`.
            ConnectionLostError, NotRemoteError: with `remote`, if there is no server, or it has another model.
        """
        self._check_used(prompts, kwargs)
        return self._trace(self._forward, prompts, early_stop, kwargs, remote=remote)

    @_at_the_users_line
    def generate(
        self, prompts: Any = None, *, early_stop: bool = True, remote: bool | str = False, **kwargs: Any
    ) -> Trace:
        """Trace a generation: `with model.generate(prompts, max_new_tokens=5) as tracer: ...`.

        In `for step in tracer.iter[:]:` names mean that step's forward pass. With the KV cache, step 0
        sees the prompt, and each later one the newest token alone. `tracer.result` is what the model's
        `generate` returns; `model.generate(...).run()` generates with no block, and `generate_text` gives text.

        Args:
            prompts, early_stop, remote: as in `trace`.
            **kwargs: as in `trace`, and those of the model's `generate`.

        Raises:
            InputError: as in `trace`; for prompts padded on the right, behind which nothing can be written; and in the block, if
                `generate` does not hand an argument on to the model.
        """
        given = self._check_used(prompts, kwargs, generating=True)
        count = kwargs.get("max_new_tokens", 1)
        if count is not None and not count_of(count):
            raise InputError(
                f"max_new_tokens={count!r}: it is a whole number, 1 or more. A pass that writes nothing is a trace."
            )
        arguments = {**(prompts if isinstance(prompts, Mapping) else {}), **kwargs}
        masked = arguments.get("attention_mask") is not None

        def call(inputs: dict[str, Any]) -> Callable[[], Any]:
            self._refuse_right_padding(inputs.get("attention_mask"))
            if "position_ids" not in given:
                inputs.pop("position_ids", None)  # generate makes its own, for every step
            if not masked and (past := cached_positions(inputs)):  # generate is given the prompt with its past
                inputs["attention_mask"] = inputs["attention_mask"][:, past:]
            if "decoder_input_ids" not in given:
                inputs.pop("decoder_input_ids", None)
            if arguments.get("stop_strings") is not None:
                inputs.setdefault("tokenizer", self.tokenizer)
            if getattr(self.hf_model.generation_config, "pad_token_id", None) is None:
                inputs.setdefault("pad_token_id", self._prompts.pad_token_id)
            return self._shards.in_order(partial(self.hf_model.generate, **self._prompts.taken(inputs)))

        return self._trace(call, prompts, early_stop, kwargs, given, remote)

    @overload
    def generate_text(
        self, prompts: str, *, skip_special_tokens: bool = True, num_return_sequences: None = None, **kwargs: Any
    ) -> str: ...

    @overload
    def generate_text(self, prompts: list[str], *, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]: ...

    @overload
    def generate_text(self, prompts: Any, *, skip_special_tokens: bool = True, **kwargs: Any) -> str | list[str]: ...

    @_at_the_users_line
    def generate_text(self, prompts: Any, *, skip_special_tokens: bool = True, **kwargs: Any) -> str | list[str]:
        """The text that the model generates after prompts, with its lasting edits if it has any.

        Args:
            prompts: as in `trace`.
            skip_special_tokens: leave out tokens such as that of the end.
            **kwargs: go to the model's `generate`: `max_new_tokens=5`, `do_sample=True`, ...

        Returns:
            The text after the one prompt; a list where there are several rows: for a list of prompts, and of
            `num_return_sequences` for each.

        Raises:
            InputError: as `generate`; and if there is no tokenizer.

        Example:
            >>> from nnatomy import StandardizedTransformer
            >>> model = StandardizedTransformer("demo:gpt2")
            >>> model.generate_text("The capital of France is", max_new_tokens=2)
            ' Paris.'
        """
        self._need_tokenizer()
        result = self.generate(prompts, **kwargs).run()
        sequences = getattr(result, "sequences", result)
        inputs = self.prepare(prompts, **kwargs)
        read = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        new = sequences if read is None else sequences[:, read.shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=skip_special_tokens)
        return texts[0] if len(texts) == 1 and not is_batch(prompts) else texts

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise InputError("Text needs a tokenizer: StandardizedTransformer(model, tokenizer).")

    def _trace(
        self,
        call: Callable[[dict[str, Any]], Callable[[], Any]],
        prompts: Any,
        early_stop: bool,
        kwargs: dict[str, Any],
        generated: set[str] | None = None,
        remote: bool | str = False,
    ) -> PromptTrace:
        """A trace of `call(inputs)()`; `generated`: the names of what is given to `generate`, if that is what is called."""
        given = GivenPrompts()
        sender = self._sent(remote) if remote is not False else None

        def known(inputs: dict[str, Any]) -> Callable[[], Any]:
            given.mask, given.untold = inputs.get("attention_mask"), untold(inputs)
            given.media = frozenset(name for name in (*PIXELS, *SOUND) if inputs.get(name) is not None)
            given.seq = given.mask.shape[1] if isinstance(given.mask, Tensor) and given.mask.ndim == 2 else None
            context = self._prompts.context
            if generated is not None and context is not None and given.seq is not None:
                given.end = context.end_of(given.seq, inputs, getattr(self.hf_model, "generation_config", None))
            return undone_unless_it_returns(call(inputs), inputs)

        early_stop = early_stop and self._shards.can_be_left
        open_trace = partial(PromptTrace, self, given=given, generated=generated, sender=sender)
        alone = any(kwargs.get(name) is not None for name in MEDIA)  # sound, which is a prompt by itself for some
        if prompts is not None or alone or self._prompts.read(kwargs):
            inputs = self.prepare(prompts, **kwargs)
            return open_trace(known(inputs), early_stop=early_stop and not states_in(inputs))
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
        early_stop = early_stop and not states_in(kwargs)
        return open_trace(joining, early_stop=early_stop)

    def _sent(self, name: bool | str) -> Any:
        """What has a server run the model's forward passes. (It needs packages of its own.)"""
        from nnatomy.remote.sending import sender_of

        return sender_of(self, name if isinstance(name, str) else None)

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
        self._check_used(prompts, kwargs)
        if self._ranks is not None:
            raise InputError(
                "A scan runs over fake tensors, which the ranks of a model that is split over processes cannot exchange: scan the "
                "model in one process, on the meta device, or trace it."
            )
        inputs = copies_of_states(self._prompts.taken(self.prepare(prompts, **kwargs)))
        # (Of a model without weights, on the meta device, the real ones would be elsewhere.)
        keep = None if self.device.type == "meta" else RealWholeNumbers()
        return self._new_trace(on_fake_tensors(self.module, (), inputs, keep), early_stop)
