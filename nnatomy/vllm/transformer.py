"""`VllmTransformer`: a model that vLLM runs, open to read and edit under the standard names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import (
    AssignmentError,
    InputError,
    LoadError,
    NoSuchModuleError,
    counted,
)
from nnatomy.names import OF_LAYERS, ROWS
from nnatomy.standardized.asked_for import check_model
from nnatomy.standardized.inputs import Prompts, is_batch
from nnatomy.standardized.loading import load_tokenizer, locate
from nnatomy.standardized.pickling import NotPickled
from nnatomy.standardized.positions import numbers
from nnatomy.standardized.special_tokens import pad_token_id, padding_token_id
from nnatomy.standardized.steering import checked_layers, checked_vector
from nnatomy.tracing import ModuleView, Traceable
from nnatomy.tracing.attach import Point
from nnatomy.validation.report import Report
from nnatomy.vllm.accessors import Accessor
from nnatomy.vllm.arguments import check_engine, import_vllm, no_such_way, tokenizer_of
from nnatomy.vllm.engine import AnyEngine, Engine, Generation
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.trace import EngineTrace
from nnatomy.vllm.validation import How, Validation
from nnatomy.vllm.values import Values
from nnatomy.weights.names import ROWS as WEIGHTS

#: Names of a step that belong to no layer.
OF_STEPS = (
    *("requests", "input_ids", "attention_mask", "input_size", "token_embeddings", "logits", "next_token_probs"),
    "sampled_tokens",
)


class VllmTransformer(NotPickled, Values, Traceable):
    """A model on vLLM's own classes, under the standard names: what `StandardizedTransformer(id, engine="vllm")` gives.

    `docs/vllm.md` has the names, what a step is, and what an engine cannot do.

    Args:
        model: a hub id, a folder, `demo:smollm2`; or a `vllm.LLM` that runs its model in this process.
        engine: "vllm".
        tokenizer: a tokenizer, or its id or folder; the model's own if None.
        validate: prove every name: `"transformers"` against the values of the same model in Transformers, which is loaded for that,
            `"algebra"` by the residual stream's sums alone; True takes the first where the memory is there, and says so in
            `validation`. What cannot be proven is refused, with the reason. With False nothing is checked.
        **kwargs: go to `vllm.LLM`: dtype, max_model_len, kv_cache_memory_bytes, ...

    Raises:
        MissingPackageError: if vLLM is not installed.
        InputError: for an engine that there is not, or what is no argument of the engine's.
        LoadError: if the engine cannot load the model.
        UnknownArchitectureError: if nobody can tell what its layers are.

    Attributes:
        loaded_from: the id or folder of the model.
        engine: vLLM in this process; `engine.llm` is the `vllm.LLM`.
        tokenizer: what makes tokens of text, or None.
        validation: a table of each name on each layer: verified or refused, with errors and reasons.
    """

    #: What a method that is given one says.
    instead_in_methods = (
        "of a model on Transformers: load it without engine=. An engine has reads, edits and generations"
    )

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        engine: str = "vllm",
        validate: How = True,
        **kwargs: Any,
    ) -> None:
        check_engine(engine)
        if validate not in (True, False, "transformers", "algebra"):
            raise InputError(f"validate={validate!r}: it is True, False, 'transformers' or 'algebra'.")
        vllm = import_vllm()
        if isinstance(model, vllm.LLM):
            if kwargs:
                raise InputError(f"{', '.join(kwargs)}: arguments of vllm.LLM, but the engine is already loaded.")
            place = str(model.llm_engine.model_config.model)
        else:
            if isinstance(model, torch.nn.Module):
                raise InputError(
                    f"engine='vllm': the engine loads its model itself; a loaded {type(model).__name__} was given. Give its id or "
                    "folder: model.save_pretrained(folder)."
                )
            check_model(model)
            model = place = locate(model)
        with tokenizer_of(None if isinstance(model, vllm.LLM) else tokenizer) as of_engine:
            tokenizer, why = _tokenizer(place, tokenizer, kwargs)
            if tokenizer is None:
                kwargs.setdefault("skip_tokenizer_init", True)
            self._load(Engine(model, {**kwargs, **of_engine}), place, tokenizer, why)
        self._read(validate)

    def _load(self, engine: AnyEngine, place: str, tokenizer: Any, no_tokenizer: str) -> None:
        Traceable.__init__(self, engine.model)
        self.loaded_from = place
        self.engine = engine
        self.tokenizer = tokenizer
        config: Any = engine.text_config
        vocab = int(config.vocab_size)
        self._prompts = Prompts(
            tokenizer,
            no_tokenizer,
            pad_token_id(tokenizer, config, vocab),
            padding_token_id(tokenizer, config),
            vocab,
            False,
        )

    def _read(self, validate: How) -> None:
        self._refused: dict[str, str] = {}
        found = Validation(self, validate)
        self._anatomy = found.anatomy
        self._embeddings = found.embeddings
        for name in OF_LAYERS:
            setattr(self, name, Accessor(ROWS[name], found.places[name], self._blocks))
        found.check()
        self._embeddings, self._refused = found.embeddings, found.refused
        self.validation: Report = found.report()

    # Running.

    def trace(self, prompts: Any = None, *, early_stop: bool = True, **kwargs: Any) -> EngineTrace:  # type: ignore[override]
        """Trace one step of the engine, that of the prompts: `with model.trace(prompts) as tracer: ...`.

        Args:
            prompts: as in `StandardizedTransformer.trace`: text, a chat, token ids, or a list of these.
            early_stop: end the step when the block ends; with False it runs to its end, and `tracer.result` has each prompt's next
                token.
            **kwargs: what says how texts become tokens: `prepend_bos`, `continue_final_message`, `add_generation_prompt`.

        Raises:
            InputError: if there is nothing to run, or the prompts do not fit in one step; it says what to load the engine with.
            UsageError: if the engine is at work.
        """
        lists = self.token_lists(prompts, kwargs)
        self.check_one_step(lists)
        params = self.engine.sampling(len(lists), 1, None, {})
        return self.open(lists, params, self.whole(lists), generates=False, early_stop=early_stop)

    def generate(
        self,
        prompts: Any = None,
        *,
        max_new_tokens: int | None = None,
        sampling_params: Any = None,
        early_stop: bool = True,
        prepend_bos: bool | None = None,
        **kwargs: Any,
    ) -> EngineTrace:
        """Trace a generation: `with model.generate(prompts, max_new_tokens=20) as tracer: ...`.

        In `for step in tracer.iter[:]:` names mean that step of the engine: `model.requests` says which prompts its rows are, and
        `model.sampled_tokens` what is sampled behind each. `tracer.result` is a list of the engine's `RequestOutput`.

        Args:
            prompts: as in `trace`; as many as one likes, which the engine schedules as it does.
            max_new_tokens: how many tokens are written at most; 16 by default.
            sampling_params: one for all or a list of one for each prompt: `vllm.SamplingParams`, or a dict of their fields.
            early_stop: end the generation when the block ends; with False it runs to its end.
            prepend_bos: as in `trace`.
            **kwargs: fields of `vllm.SamplingParams`: temperature (0 by default), top_p, seed, stop, ignore_eos, ...

        Raises:
            InputError: as `trace`, and for what is no sampling parameter.
            UsageError: if the engine is at work.
        """
        texts = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        lists = self.token_lists(prompts, texts)
        params = self.engine.sampling(len(lists), max_new_tokens, sampling_params, kwargs)
        return self.open(lists, params, early_stop=early_stop)

    def generate_text(self, prompts: Any, **kwargs: Any) -> str | list[str]:
        """The text that the model generates after prompts, with its lasting edits: of one prompt a text, else a list."""
        if self.tokenizer is None:
            raise InputError("Text needs a tokenizer: give tokenizer=... when loading.")
        texts = [output.outputs[0].text for output in self.generate(prompts, **kwargs).run()]
        return texts[0] if len(texts) == 1 and not is_batch(prompts) else texts

    def __call__(self, prompts: Any = None, **kwargs: Any) -> Any:
        """One step of the engine on prompts, with the lasting edits: a list of its `RequestOutput`."""
        return self.trace(prompts, **kwargs).run()

    def scan(self, *_: Any, **__: Any) -> Any:
        """Raises UsageError: the engine's kernels do not run on fake tensors."""
        raise no_such_way("scan", "the engine's kernels compute, and give no shapes alone")

    trace_call = scan

    def open(
        self,
        lists: list[list[int]],
        params: list[Any],
        whole: Callable[[Layout], None] | None = None,
        *,
        generates: bool = True,
        early_stop: bool = True,
    ) -> EngineTrace:
        """A trace of the engine's work on token ids, with sampling parameters of each; `whole`: see `nnatomy.vllm.run.Requests`."""
        self.engine.check_free()
        work = Generation(self.engine, lists, params)
        return EngineTrace(self, self.engine, work, whole, generates=generates, early_stop=early_stop)

    def token_lists(self, prompts: Any, texts: Mapping[str, Any] | None = None) -> list[list[int]]:
        """The token ids of prompts. Raises InputError for what is none, and what is too long."""
        inputs = self._prompts.prepare(prompts, dict(texts or {}), torch.device("cpu"))
        others = {*inputs} - {"input_ids", "attention_mask"}
        if others:
            raise InputError(f"{', '.join(sorted(others))}: the engine makes its own from token ids. Leave it out.")
        masks = inputs["attention_mask"].bool()
        lists = [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
        limit = self.engine.max_model_len
        for i, one in enumerate(lists):
            if len(one) >= limit:
                raise InputError(
                    f"Prompt {i} has {counted(len(one), 'token')}, and the engine takes fewer than its max_model_len, "
                    f"{limit}, so that one can be written: give a shorter one, or load the engine with max_model_len={len(one) + 1}."
                )
        return lists

    def check_one_step(self, lists: list[list[int]]) -> None:
        """Raise InputError where prompts do not fit in one step of the engine."""
        tokens, most, rows = sum(map(len, lists)), self.engine.step_tokens, self.engine.step_requests
        if tokens > most:
            raise InputError(
                f"The prompts have {tokens} tokens, and one step of the engine takes {most}: trace fewer at once, or load it with "
                f"max_num_batched_tokens={tokens}."
            )
        if len(lists) > rows:
            raise InputError(
                f"There are {len(lists)} prompts, and one step of the engine takes {rows}: trace fewer at once, or "
                f"load it with max_num_seqs={len(lists)}."
            )

    def whole(self, lists: list[list[int]]) -> Callable[[Layout], None]:
        """What raises an error if a step does not have all of these prompts."""
        lengths = [len(one) for one in lists]

        def check(layout: Layout) -> None:
            found = dict(zip(layout.requests, layout.lengths, strict=True))
            if [found.get(i) for i in range(len(lengths))] != lengths:
                raise InputError(
                    f"The engine has scheduled {len(found)} of {len(lengths)} prompts, or parts of them, in one step, as its cache "
                    "has no room for all: trace fewer at once, or load it with a larger kv_cache_memory_bytes."
                )

        return check

    def steer(
        self,
        layers: int | Sequence[int],
        steering_vector: Float[Tensor, hidden],  # noqa: F821
        factor: float = 1.0,
        *,
        requests: int | Sequence[int] | None = None,
    ) -> None:
        """Add `factor * steering_vector` to the output of layers, at every position of this step (Turner et al. 2023).

        In a block it acts in the step that the block is in; in a function for `edit` in every step.

        Args:
            layers: one or several.
            steering_vector: of (hidden), such as one of `SteeringVector.directions`, found with the model in Transformers.
            requests: which prompts; all if None. One that takes no part in the step is left out of it.

        Raises:
            InputError: if the vector is not as wide as the stream, or layers or requests are no numbers.
            LayerIndexError: for a layer that there is not.

        Example:
            `steered = model.edit(lambda: model.steer(14, direction, 4.0))`, then `steered.generate_text(prompts)`.
        """
        vector = checked_vector(steering_vector, factor, self.hidden_size)
        if vector.ndim != 1:
            raise InputError(
                f"The steering vector is of shape {tuple(vector.shape)}: a step has tokens of all prompts in one axis, so give one "
                f"of ({self.hidden_size},)."
            )
        wanted = None if requests is None else {*numbers("requests", requests)}
        for layer in sorted(
            range(self.num_layers)[one] for one in checked_layers(layers) if self.layers_output.at(one)
        ):
            stream = self.layers_output[layer]
            rows = [row for row, request in enumerate(self.requests) if wanted is None or request in wanted]
            stream[rows] += factor * vector.detach().to(stream)

    # What the model is.

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self._anatomy.layers)

    @property
    def num_heads(self) -> int:
        """How many query heads a layer has."""
        return int(self.engine.text_config.num_attention_heads)

    @property
    def vocab_size(self) -> int:
        """How many tokens the model can predict."""
        return int(self.engine.text_config.vocab_size)

    @property
    def config(self) -> Any:
        """The model's config, of Transformers."""
        return self.engine.hf_config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.engine.device

    @property
    def layers(self) -> tuple[ModuleView, ...]:
        """The layers, as views."""
        paths = {module: path for path, module in self.module.named_modules()}
        return tuple(self[paths[layer.module]] for layer in self._anatomy.layers)

    def _point(self, point: str | ModuleView) -> Point:
        match = re.fullmatch(r"(\w+)\[(-?\d+)\]", point) if isinstance(point, str) else None
        accessor = getattr(self, match[1], None) if match else None
        if match is None or not isinstance(accessor, Accessor):
            return super()._point(point)
        return accessor.point(int(match[2]))

    def _no_such(self, name: str) -> NoSuchModuleError:
        error = super()._no_such(name)
        if name in WEIGHTS:
            return NoSuchModuleError(
                f"{error} Weights by name are of a model on Transformers: load it without engine=."
            )
        return NoSuchModuleError(f"{error} The standard names are {', '.join((*OF_STEPS, *OF_LAYERS))}.")

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AssignmentError for a name that is one for each layer or only read; NoSuchModuleError for none, in a trace."""
        known = self.__dict__.get(name)
        if isinstance(known, Accessor) and not isinstance(value, Accessor):
            raise AssignmentError(f"{name} is one for each layer: assign {name}[i] = ..., or {name}[:] = [one, ...].")
        of_class = getattr(type(self), name, None)
        if isinstance(of_class, property) and of_class.fset is None:
            raise AssignmentError(f"{name} can be read, and not assigned.")
        if not (name.startswith("_") or name in self.__dict__ or of_class is not None):
            blocks = getattr(self, "_blocks", None)
            if blocks is not None and blocks.is_open_here:
                raise self._no_such(name)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {type(self.engine.model).__name__}, {self.num_layers} layers, hidden {self.hidden_size}>"


def _tokenizer(place: str, given: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """What makes tokens of text; or None, and why there is none."""
    shared: dict[str, Any] = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    if given is None:
        return load_tokenizer(place, shared)
    if not isinstance(given, (str, Path)):
        return given, ""
    tokenizer, why = load_tokenizer(given, shared)
    if tokenizer is None:
        raise LoadError(f"The tokenizer {str(given)!r} could not be loaded: {why}")
    return tokenizer, ""
