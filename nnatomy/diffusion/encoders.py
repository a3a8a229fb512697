"""What encodes the prompt: a pipeline's text encoders, each with the standard names of a transformer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Slot
from nnatomy.errors import AssignmentError, InputError, ModelError, NoSuchModuleError, NotInThisModelError
from nnatomy.names import TABLE
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.accessors import LayerAccessor, check_fits
from nnatomy.tracing import ModuleView

_OF_LAYERS = [row.name for row in TABLE if row.part not in ("model", "cross_attentions")]


class EncoderView(ModuleView):
    """A text encoder: its modules, and the standard names of its layers, in the generations of its pipeline.

    `model.text_encoder.layers_output[3]` is (batch, seq, hidden) of what it makes of the prompt. Where the pipeline calls it again
    for the negative prompt, that is `model.text_encoder.calls[1].layers_output[3]`.

    Attributes:
        validation: the table of its names, each proven at load on the encoder alone.
    """

    def __init__(
        self,
        blocks: OpenBlocks,
        module: Module,
        path: str,
        call: int,
        encoder: StandardizedTransformer | None,
        why: str,
    ) -> None:
        super().__init__(blocks, module, path, call)
        self._encoder, self._why = encoder, why
        if encoder is not None:
            self.validation = encoder.validation
            said = f"{path}.calls[{call}]" if call else path
            for name in _OF_LAYERS:
                setattr(self, name, getattr(encoder, name).of_part(f"{said}.{name}", blocks, call))

    @property
    def token_embeddings(self) -> Tensor:
        """(batch, seq, hidden): what its token embedding gives; can be assigned."""
        return self._embedded().value

    @token_embeddings.setter
    def token_embeddings(self, value: Tensor) -> None:
        slot = self._embedded()
        check_fits(f"{self.path}.token_embeddings", slot.value, value)
        slot.value = value

    def _embedded(self) -> Slot:
        name = f"{self.path}.token_embeddings"
        if self._encoder is None:
            raise self._no_such("token_embeddings")
        if why := self._encoder._refused.get("token_embeddings"):
            raise NotInThisModelError(f"{name}: {why}.")
        return self._blocks.current(name).reach(self._encoder._anatomy.embed_tokens, "output", name, self._call)

    def _module_view(self, module: Module, path: str, call: int = 0) -> ModuleView:
        if module is self.module:
            return EncoderView(self._blocks, module, path, call, self._encoder, self._why)
        return super()._module_view(module, path, call)

    def _no_such(self, name: str) -> NoSuchModuleError:
        error = super()._no_such(name)
        if name in (*_OF_LAYERS, "token_embeddings", "validation"):
            return NoSuchModuleError(f"{self.path}.{name}: the encoder's names could not be found: {self._why}.")
        return error

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AssignmentError for a name that is one for each layer."""
        if isinstance(self.__dict__.get(name), LayerAccessor) and not isinstance(value, LayerAccessor):
            raise AssignmentError(
                f"{self.path}.{name} is one for each layer: assign {self.path}.{name}[i] = ..., or {name}[:] = [one, ...]."
            )
        super().__setattr__(name, value)


def encoders_of(components: Mapping[str, Any], blocks: OpenBlocks, validate: bool) -> dict[str, EncoderView]:
    """The text encoders of a pipeline, by their names in it, each opened (and proven) as a model of its own."""
    found = {}
    for name, component in components.items():
        if isinstance(component, PreTrainedModel) and name.startswith("text_encoder"):
            encoder, why = None, ""
            try:
                encoder = StandardizedTransformer(component, validate=validate)
            except (ModelError, InputError) as error:
                why = str(error).splitlines()[0].rstrip(".")
            found[name] = EncoderView(blocks, component, name, 0, encoder, why)
    return found
