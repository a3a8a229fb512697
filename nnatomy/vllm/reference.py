"""The same model in Transformers, on a few prompts: what every name is there, with and without edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnatomy.names import OF_LAYERS
from nnatomy.standardized.choice import has

#: By name and layer.
Values = dict[tuple[str, int], Tensor]


class Reference:
    """A model of Transformers that the engine's is compared with.

    Args:
        place: what both are loaded from.
        dtype: that of the engine.
        prompts: their token ids.
        config: the engine's.
        options: how it is loaded.
    """

    def __init__(
        self, place: str, dtype: torch.dtype, prompts: Sequence[Sequence[int]], config: Any, options: dict[str, Any]
    ) -> None:
        from vllm.config import set_current_vllm_config

        from nnatomy.standardized import StandardizedTransformer

        # The engine runs some models on the classes of Transformers, which it decorates for the whole process: they can be made
        # under a config of its own alone.
        with set_current_vllm_config(config):
            # "eager" is what the model is by definition: PyTorch's own kernel leaves Gemma 2's cap of the scores out.
            self.model: Any = StandardizedTransformer(place, dtype=dtype, attn_implementation="eager", **options)
        self.prompts = [list(one) for one in prompts]

    @property
    def config(self) -> Any:
        """Its config."""
        return self.model.config

    def reasons(self, count: int) -> dict[tuple[str, int], str]:
        """Why it has not a name on a layer, where it has not."""
        found = {}
        for name in OF_LAYERS:
            accessor = getattr(self.model, name)
            for i in range(count):
                if not len(accessor):
                    found[name, i] = "the model in Transformers has none"
                elif not has(accessor, i):
                    found[name, i] = accessor._absent[i] or "the model in Transformers has none"
        return found

    def values(self, names: Sequence[str], prompts: Sequence[Sequence[int]] | None = None) -> tuple[Tensor, Values]:
        """The logits, and the names of all layers that have them."""
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(self.prompts if prompts is None else prompts, list(names))
        return logits, {(name, i): cache[name, i] for name in names for i in getattr(cache, name).layers}

    def edited(self, changes: Values) -> Tensor:
        """The logits where each of these has been added to what the name is on that layer."""
        with torch.no_grad(), self.model.trace(self.prompts):
            for (name, layer), change in changes.items():
                accessor = getattr(self.model, name)
                accessor[layer] = accessor[layer] + change
            return self.model.logits
