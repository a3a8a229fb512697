"""Reading many names at once, in a trace or in a call of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnatomy.errors import InputError, LayerIndexError, counted
from nnatomy.names import Name
from nnatomy.standardized.accessors import LayerAccessor, read_together
from nnatomy.standardized.activation_cache import ActivationCache
from nnatomy.standardized.choice import Layers, accessor_of, accessors_of, check_kept_as, has, layers_of
from nnatomy.standardized.kept_state import states_in
from nnatomy.standardized.positions import OwnPositions, Where, is_fake, numbers, of_encoder_alone, own_positions
from nnatomy.standardized.prompt_trace import RootInputs
from nnatomy.standardized.running import Running

#: What is read only where it is named: a pattern for each entry of the values' heads.
NAMED_ONLY = ("values_weighted",)
Wanted = list[tuple[LayerAccessor, list[int]]]


class Reading(Running):
    """A model of which many names are read at once."""

    def run_with_cache(
        self,
        prompts: Any = None,
        names: str | Sequence[str] | None = None,
        *,
        layers: Layers = None,
        positions: Where = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run the model on prompts, with its lasting edits, and keep what its names have: the logits, and a cache.

        One forward pass, which does not stop at the names, and whose logits are the model's own. With gradients on, as in a trace,
        values and logits hold on to the graph: run it under `torch.no_grad()` where no gradients are wanted.

        Args:
            prompts, **kwargs: as in `trace`.
            names: the standard names to keep. None: all that the model has, of an encoder-decoder those of both parts, but
                `values_weighted`. Patterns and scores grow with the square of the prompts' length: of long ones, name what is
                wanted.
            layers, positions, device, dtype: what of each value is kept, and how: see `read`.

        Returns:
            The logits, (batch, seq, vocab), or None of a model without a head; and the cache, values of which are
            `cache.layers_output[5]`, `cache["attention_probabilities", 5]`, `cache.stack("layers_output")`.

        Raises:
            InputError: as `trace` and `read`.
            LayerIndexError, NotInThisModelError: for a layer or a name that the model has not; before it is run.

        Example:
            >>> from nnatomy import StandardizedTransformer
            >>> model = StandardizedTransformer("demo:gpt2")
            >>> logits, cache = model.run_with_cache("The capital of France is")
            >>> cache.layers_output[5].shape, cache["attention_probabilities", -1].shape
            (torch.Size([1, 5, 96]), torch.Size([1, 6, 5, 5]))
            >>> _, cache = model.run_with_cache(["Japan is in", "Peru is"], "layers_output", positions=-1)
            >>> cache.stack("layers_output").shape
            torch.Size([6, 2, 1, 96])
        """
        wanted = [one.name for one, _ in self._wanted(names, layers)]  # refused before anything is run
        inputs = self.prepare(prompts, **kwargs)
        kept = None if states_in(inputs) else dict(inputs)  # a cache of keys and values is another one then
        model: Any = self
        with model.trace(**inputs):
            cache = self.read(*wanted if names else (), layers=layers, positions=positions, device=device, dtype=dtype)
            logits = None if "logits" in self._refused else model.logits
        cache.inputs = kept
        return logits, cache

    def read(
        self,
        *names: str,
        layers: Layers = None,
        positions: Where = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ActivationCache:
        """In a trace: several names of all layers at once, in whatever order the model computes them.

        They are taken while the forward pass runs, which stops behind the last of them. Ask before the first of these layers has
        run. Where nothing below is given, values are the tensors that the names themselves would give.

        Args:
            names: none for all that the model has, but `values_weighted`.
            layers: those of one layer, several or a slice; by default of each name all that have it.
            positions: of each prompt's own: 0 is its first token, -1 its last, padding has none. One, several, or a slice,
                of which all prompts must have as many. The axis stays, with as many places; of patterns and scores it is that of
                queries. None: all columns of the batch, padding too.
            device: where values go; None: where they are.
            dtype: what those of floating point become; None: what they are.

        Raises:
            InputError: for what is no name, dtype or device, or a position that a prompt does not have.
            LayerIndexError, NotInThisModelError: for a layer or a name that the model does not have.
            OutOfOrderError: if one of them has been computed before.
            OutsideTraceError: outside of a trace.

        Example:
            >>> from nnatomy import StandardizedTransformer
            >>> model = StandardizedTransformer("demo:llama")
            >>> with model.trace("The capital of France is"):
            ...     found = model.read("layers_output", "attention_probabilities", layers=[1, -1])
            ...     logits = model.logits
            >>> found.attention_probabilities.layers, found.layers_output[-1].shape
            ((1, 7), torch.Size([1, 5, 96]))
        """
        check_kept_as(dtype, device)
        wanted = self._wanted(names or None, layers)
        found: dict[tuple[str, int], Tensor] = {}
        own: OwnPositions | None = None
        for of_encoder in (True, False):  # the encoder has run before anything is known of a decoder's step
            group = [one for one in wanted if one[0].of_encoder == of_encoder]
            if not group:
                continue
            columns = None
            if positions is not None and of_encoder:
                columns = partial(_of_encoder, positions, self._given_mask())
            elif positions is not None:
                own = own_positions(self, "positions", (None, None))
                columns = partial(_of_decoder, own.own.shape[1], own.rectangle(positions))
            as_is = columns is None and device is None and dtype is None
            values = read_together(
                group, None if as_is else partial(_kept, columns=columns, device=device, dtype=dtype)
            )
            for (accessor, chosen), each in zip(group, values, strict=True):
                found |= {(accessor.name, layer): value for layer, value in zip(chosen, each, strict=True)}
            if not of_encoder and own is None and not is_fake(first := values[0][0]):
                with suppress(InputError):  # nothing says which tokens are padding
                    own = own_positions(self, "read", (len(first), None))
        counts = {accessor.name: len(accessor) for accessor, _ in wanted}
        found = {(accessor.name, layer): found[accessor.name, layer] for accessor, chosen in wanted for layer in chosen}
        if own is None:
            return ActivationCache(found, counts, model=self)
        at = own.own if positions is None else own.own.gather(1, own.rectangle(positions))
        return ActivationCache(found, counts, at.cpu(), own.own.amax(1).cpu() + 1, self)

    def _given_mask(self) -> Any:
        """The attention mask of what an encoder reads."""
        collectors = self._blocks.current("read").run.collectors
        return next((one.given.mask for one in collectors if isinstance(one, RootInputs)), None)

    def _wanted(self, names: str | Sequence[str] | None, layers: Layers) -> Wanted:
        """The names, each with its layers. Raises InputError, LayerIndexError, NotInThisModelError."""
        chosen = layers if layers is None or isinstance(layers, slice) else numbers("layers", layers)
        if names is not None:
            if not isinstance(names, Sequence) or not names:
                raise InputError(f"names={names!r}: give one standard name or several, or None for all.")
            asked = [accessor_of(self, name) for name in _once([names] if isinstance(names, str) else names)]
            return [(one, layers_of(one, chosen)) for one in asked]
        accessors = [one for one in accessors_of(self).values() if one.row.name not in NAMED_ONLY]
        most = max(map(len, accessors))
        if isinstance(chosen, list) and (wrong := [one for one in chosen if not -most <= one < most]):
            raise LayerIndexError(
                f"layers={layers!r}: the model has {counted(most, 'layer')}, 0 to {most - 1}; none is {wrong[0]}."
            )

        def meant(count: int) -> Sequence[int]:
            if isinstance(chosen, list):
                return [layer % count for layer in chosen if -count <= layer < count]
            return range(count)[chosen or slice(None)]

        wanted = [(one, [layer for layer in meant(len(one)) if has(one, layer)]) for one in accessors]
        if wanted := [(one, there) for one, there in wanted if there]:
            return wanted
        layers_of(accessors_of(self)["layers_output"], chosen)  # raises, with the reason
        raise InputError(f"layers={layers!r}: there is nothing to read.")


def _once(names: Sequence[Any]) -> list[str]:
    """Each name once. Raises InputError for a list among them, as `read` takes one by one."""
    if lists := [one for one in names if isinstance(one, (list, tuple, set))]:
        raise InputError(f"{lists[0]!r} is no name but several: in a trace they are given one by one, read(*names).")
    return [*dict.fromkeys(names)]


def _kept(
    value: Tensor,
    row: Name,
    columns: Callable[[Name, tuple[int, int]], Tensor] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """What is kept of a value, in memory of its own."""
    kept = value
    if columns is not None:
        assert row.seq is not None
        at = columns(row, (value.shape[0], value.shape[row.seq])).to(value.device)
        rows = torch.arange(len(at), device=at.device)[:, None]
        kept = value.movedim(row.seq, 1)[rows, at].movedim(1, row.seq)
    kept = kept.to(device=device, dtype=dtype if value.is_floating_point() else None)
    return kept.clone() if kept is value else kept


def _of_encoder(positions: Any, mask: Any, row: Name, shape: tuple[int, int]) -> Tensor:
    return of_encoder_alone(f"encoder_{row.name}", shape, mask).rectangle(positions)


def _of_decoder(seq: int, columns: Tensor, row: Name, shape: tuple[int, int]) -> Tensor:
    if shape != (len(columns), seq):
        raise InputError(
            f"{row.name}: the values are of {shape[0]} rows and {shape[1]} positions, and the step computes "
            f"{len(columns)} and {seq}, so that nothing says which position is which token: read it without positions."
        )
    return columns
