"""The names of an engine's model, found and proven at load.

Two short prompts of unequal length are run. Where the same model fits into memory in Transformers as well, each name on each layer is
compared with what it is there; then all layers of a name are changed by the same amounts in both, and the logits have to come out the
same; then a step of generation (`compared`). Else the stream's algebra has to hold (`algebra`). What is not so is refused, with the
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from nnatomy.core.points import Collector
from nnatomy.errors import InputError
from nnatomy.names import OF_LAYERS
from nnatomy.validation.report import Report, Row
from nnatomy.vllm.algebra import Algebra
from nnatomy.vllm.anatomy import anatomy_of
from nnatomy.vllm.compared import Compared
from nnatomy.vllm.finding import Options, options, place_of
from nnatomy.vllm.places import Place
from nnatomy.vllm.reading import Placed, Reader
from nnatomy.vllm.recording import Recorder
from nnatomy.vllm.reference import Reference
from nnatomy.vllm.split import all_of, ranks

#: By what names are proven; True takes Transformers where the memory is there.
How = bool | Literal["transformers", "algebra"]
#: How long the prompts are that names are checked on, where the engine takes as many tokens in a step.
LENGTHS = 7, 11
#: Names of the model as a whole that are proven.
_OF_MODEL = ("input_ids", "token_embeddings", "logits", "project_on_vocab")
_NOT_HERE = "nothing is known here of the engine's classes for it (recurrent mixers, attention to an encoder)"


class Validation:
    """The names of a model.

    Attributes:
        prompts: what they are checked on.
        anatomy: the model's parts.
        options: of each name on each layer, where it may be.
        places: of each name on each layer, where it is, or why it is not there.
        embeddings: where `token_embeddings` is.
        refused: of the names of no layer, why they are not to be had.
    """

    def __init__(self, model: Any, how: How) -> None:
        self.model, self.engine = model, model.engine
        self.refused: dict[str, str] = {}
        self._how: How = how
        self._errors: dict[tuple[str, int | None], float] = {}
        self._by = "nothing was checked"
        generator = torch.Generator().manual_seed(0)
        self.prompts = [
            torch.randint(0, model.vocab_size, (length,), generator=generator).tolist() for length in self._lengths()
        ]
        self._find()

    def _lengths(self) -> tuple[int, ...]:
        """How long the prompts are: both fit in one step, with room for two more tokens."""
        limit, most = self.engine.max_model_len, self.engine.step_tokens
        count = min(self.engine.step_requests, len(LENGTHS))
        part = min(1, most / sum(LENGTHS))
        lengths = tuple(min(max(int(one * part), 1), limit - 2) for one in LENGTHS[-count:])
        if lengths[-1] < 4:
            raise InputError(
                f"max_num_batched_tokens={most}, max_model_len={limit}: names are proven on a prompt "
                "of four tokens or more, in one step. Load the engine with larger ones."
            )
        return lengths

    def _find(self) -> None:
        recorder = Recorder(self.engine.model.modules(), sum(map(len, self.prompts)))
        self._run(recorder)
        width = self.model.hidden_size
        self.anatomy = anatomy_of(self.engine.model, recorder, width)
        self.options = options(self.anatomy, recorder, width, self.engine.shared_heads)
        none = [Options(why=_NOT_HERE)] * len(self.anatomy.layers)
        self.places: dict[str, list[Place | str]] = {
            name: [one.first for one in self.options.setdefault(name, none)] for name in OF_LAYERS
        }
        embedding = self.anatomy.embed_tokens
        self.embeddings: Place | None = None
        if embedding is None:
            self.refused["token_embeddings"] = "the token embedding is not called within the model"
        else:
            self.embeddings = place_of(embedding, "output", recorder.points[embedding, "output"][0])
        if self.anatomy.head is None:
            self.refused["logits"] = "none of the engine's classes makes logits"
        if self.anatomy.head is None or self.anatomy.ln_final is None:
            self.refused["project_on_vocab"] = "no norm reads what the last layer gives"

    def check(self) -> None:
        """Prove the names, and refuse what cannot be proven."""
        if not self._how:
            return
        why = "validate='algebra'" if self._how == "algebra" else self._no_memory()
        if why:
            self._by = f"by the stream's algebra: {why}"
            Algebra(self).check()
        else:
            trusted = {"trust_remote_code": True} if self.engine.config.model_config.trust_remote_code else {}
            reference = Reference(self.model.loaded_from, self.engine.dtype, self.prompts, self.engine.config, trusted)
            self._by = f"against {type(reference.model.hf_model).__name__} of Transformers"
            Compared(self, reference).check()

    def _no_memory(self) -> str:
        """Why the model does not fit into memory a second time; "" if it does, or has to."""
        import psutil  # the engine brings it

        if self._how == "transformers":
            return ""
        size = sum(one.numel() * one.element_size() for one in self.engine.model.parameters())
        free = psutil.virtual_memory().available
        if all_of(2 * size * ranks() <= free):
            return ""
        return f"the model in Transformers takes {size * ranks() / 1e9:.1f} GB, and {free / 1e9:.1f} are free"

    # Running.

    def _run(self, *collectors: Collector, replace: Sequence[Collector] = (), steps: int = 1) -> list[Any]:
        """Run the prompts, with nobody but these; gives the outputs."""
        params = self.engine.sampling(len(self.prompts), steps, None, {"ignore_eos": True})
        with self.model.open(self.prompts, params, self.model.whole(self.prompts), early_stop=False) as tracer:
            run = tracer.block.run
            for one in (*replace, *collectors):
                one.run = run  # type: ignore[attr-defined]
            for one in replace:
                run.replace(one)
            run.collect(*collectors)
            return list(tracer.result)

    def read(self, places: Iterable[Placed], step: int = 0, replace: Sequence[Collector] = ()) -> Reader:
        """What is at these places in that step, with the logits of all positions."""
        head = None if "logits" in self.refused else self.model.compute_logits
        reader = Reader(places, step, self.engine.model, head)
        reader.outputs = self._run(reader, replace=replace, steps=step + 1)
        return reader

    def everywhere(self, names: Iterable[str]) -> list[Placed]:
        """The places of names on all layers that have them."""
        return [(name, i, one) for name in names for i, one in enumerate(self.places[name]) if isinstance(one, Place)]

    def options_of(self, names: Iterable[str]) -> list[Placed]:
        """The places that names may be at, on all layers that have them."""
        return [(name, i, one) for name, i, _ in self.everywhere(names) for one in self.options[name][i].places]

    @property
    def there(self) -> list[str]:
        """The names that some layer has."""
        return [name for name in OF_LAYERS if any(isinstance(one, Place) for one in self.places[name])]

    # What is found.

    def refuse(self, name: str, layer: int, why: str) -> None:
        """Give it there no more, for this reason."""
        self._set(name, layer, why)

    def choose(self, name: str, layer: int, place: Place) -> None:
        """It is there."""
        self._set(name, layer, place)

    def _set(self, name: str, layer: int, where: Place | str) -> None:
        self.places[name][layer] = where
        getattr(self.model, name).places[layer] = where

    def note(self, name: str, layer: int | None, error: float) -> None:
        """Note how far a value was off."""
        self._errors[name, layer] = max(error, self._errors.get((name, layer), 0.0))

    def report(self) -> Report:
        """What was found, of each name on each layer."""
        good: Any = "verified" if self._how else "unverified"
        rows = [Row("validation", None, good, None, self._by)]
        for name in _OF_MODEL:
            why = self.refused.get(name, "")
            rows.append(Row(name, None, "refused" if why else good, self._errors.get((name, None)), why))
        for name, places in self.places.items():
            for i, place in enumerate(places):
                error = self._errors.get((name, i))
                if isinstance(place, Place):
                    detail = place.only_read and f"only read: {place.only_read}"
                    rows.append(Row(name, i, good, error, detail))
                else:
                    rows.append(Row(name, i, "refused", error, place))
        return Report(f"{type(self.engine.model).__name__} on vLLM", rows)
