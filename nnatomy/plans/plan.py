"""`Plan`: what a block did, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnatomy.core.frames import warn
from nnatomy.errors import NnatomyError, PlanError, a_kind
from nnatomy.paths import path_of
from nnatomy.plans.expected import Check, compare
from nnatomy.plans.graph import Block, Node
from nnatomy.plans.identity import weights
from nnatomy.plans.replay import Replay
from nnatomy.plans.rows import Row
from nnatomy.plans.text import one_line, written


class Plan:
    """What blocks did to a model, as data: made by `model.record`, `load_plan`, `from_control_vector` or `from_pyvene`.

    It means what the block does to each prompt alone: in a batch to each prompt's own positions, in a generation in each step, as
    a lasting edit does (`model.edit`). `print(plan)` reads like the block.

    Attributes:
        blocks: what each block did, as nodes (see `nnatomy.plans.graph`).
        constants: its tensors, by name.
        about: the model that it was recorded on: id, revision, class, type, sizes, dtype, hashes of weights and tokenizer.
        prompts: the prompts that it has expected numbers of: text (if it was one), token ids, numbers.
        only: where it is true for one prompt alone: its token ids, and why.
        notes: what is to be known of it.

    Example:
        >>> import torch
        >>> from nnatomy import StandardizedTransformer
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> v = torch.ones(model.hidden_size)
        >>> def block():
        ...     model.layers_output[3] = model.layers_output[3] + 4.0 * v
        >>> plan = model.record(block)
        >>> print(plan.summary())
        layers_output[3] = layers_output[3] + (v0 * 4)
        >>> edited = plan.apply(model)
        >>> torch.equal(edited("Japan is in").logits, model.edit(block)("Japan is in").logits)
        True
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.constants: dict[str, Tensor] = {}
        self.about: dict[str, Any] = {}
        self.prompts: list[dict[str, Any]] = []
        self.only: dict[str, Any] | None = None
        self.notes: list[str] = []
        #: Whether it was read from a file, which anybody may have written.
        self.from_file = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the model it was recorded on."""
        dtype: torch.dtype = getattr(torch, str(self.about["dtype"]))
        return dtype

    def __str__(self) -> str:
        return written(self)

    def __repr__(self) -> str:
        return f"<plan of {self.about.get('id')}: {self.summary()}>"

    def summary(self, block: int = 0) -> str:
        """The first assignment of a block, in one line."""
        if self.blocks and (type(block) is not int or not -len(self.blocks) <= block < len(self.blocks)):
            raise PlanError(f"block={block!r}: the plan has {len(self.blocks)}, 0 to {len(self.blocks) - 1}.")
        return one_line(self, block)

    def apply(self, model: Any, *, check: bool = True) -> Any:
        """A view of the model whose every trace, call and step of a generation does what the block did.

        The model may be another one, of this or another architecture, here or at a server. Names and sizes have to fit.

        Args:
            check: run the plan's prompts, and compare the numbers that it is expected to give.

        Returns:
            What `model.edit` gives; `without_edits()` is the model as it was.

        Raises:
            PlanError: if something does not fit, all of it told; or on the very weights it was recorded on it gives other
                numbers, beyond the tolerance of the dtype.

        Warns:
            UserWarning: on another model, with how far off the numbers are.
        """
        if not isinstance(check, bool):
            raise PlanError(f"check={check!r}: it is True or False.")
        if not check:
            self._check_points(model)
        else:
            found = self.check(model)
            if found.same_weights and not found.ok and not found.not_run:
                raise PlanError(f"On the weights that it was recorded on, the plan gives other numbers.\n{found}")
            if found.differs or found.not_run:
                warn(f"The plan was recorded on {self.about.get('id')}; this is {found.told}.")
        for number in range(len(self.blocks)):
            model = model.edit(Replay(self, number, model))
        return model

    def check(self, model: Any) -> Check:
        """How far off it is on a model from the numbers that it is expected to give.

        Raises:
            PlanError: if it does not fit.
        """
        self._check_points(model)
        return compare(self, model)

    def save(self, path: str | Path) -> None:
        """Write it to a folder: `plan.json`, and `tensors.safetensors`. Neither has code in it."""
        from nnatomy.plans.files import save_plan

        folder = path_of(path, "a folder to write", PlanError)
        if folder.is_file():
            raise PlanError(f"{folder} is a file: a plan is written to a folder, of several files.")
        save_plan(self, folder)

    # Whether it fits.

    @property
    def nodes(self) -> list[Node]:
        """All nodes."""
        return [node for block in self.blocks for part in block.parts for node in part.nodes]

    def _check_points(self, model: Any) -> None:
        """Raise PlanError for the names that the model does not have, all at once."""
        from nnatomy.standardized import StandardizedTransformer

        if not isinstance(model, StandardizedTransformer):
            how = f"StandardizedTransformer({model!r})" if isinstance(model, str) else "plan.apply(model)"
            if isinstance(model, torch.nn.Module):
                how = "StandardizedTransformer(model, tokenizer)"
            raise PlanError(f"A plan is applied to a StandardizedTransformer; got {a_kind(model)}: {how}.")
        if model.config.is_encoder_decoder:
            raise PlanError("Of encoder-decoders no plans are made yet.")
        missing: dict[str, str] = {}
        there = weights(model.hf_model)
        for node in self.nodes:
            try:
                if node.kind in ("read", "put"):
                    self._check_point(model, node)
                elif node.kind == "skip":
                    for layer in node.args[:2]:
                        model.layers_input.module(layer)
                elif node.kind == "weight" and node.name not in there:
                    missing[node.name] = f"{node.name}: the model has no such weight"
            except NnatomyError as error:
                missing[node.point or str(node.args)] = str(error)
        if missing:
            raise PlanError("The plan does not fit this model:\n" + "\n".join(f"- {why}" for why in missing.values()))

    def _check_point(self, model: Any, node: Node) -> None:
        if node.layer is None:
            model._check_refused(node.name)
        else:
            getattr(model, node.name).module(node.layer)
        known = {"hidden": model.hidden_size, "vocab": model.dimensions.vocab_size}
        for axis, size in node.sizes.items():
            if known.get(axis, size) != size:
                raise PlanError(_sizes(node, axis, known[axis]))

    def check_sizes(self, node: Node, value: Tensor) -> None:
        """Raise PlanError if a point's value has other sizes than where it was recorded."""
        from nnatomy.names import row_of

        axes = row_of(node.name).axes
        for axis, size in zip(axes, value.shape, strict=False):
            if node.sizes.get(axis, size) != size:
                raise PlanError(f"The plan does not fit this model: {_sizes(node, axis, size)}")

    def check_prompt(self, ids: Tensor | None, rows: list[Row]) -> None:
        """Raise PlanError if a row is of another prompt than that of a plan that is for one."""
        assert self.only is not None
        for row in rows:
            own = None if ids is None else ids[row.place("input_ids", ids, None)]
            for one in () if own is None else own.tolist():
                if one != self.only["ids"]:
                    raise PlanError(
                        f"This plan is for the one prompt that it was recorded on, of tokens {self.only['ids']!r:.80}; this one has "
                        f"{one!r:.80}. ({self.only['why']}.)"
                    )


def _sizes(node: Node, axis: str, here: Any) -> str:
    return f"{node.point}: {axis} is {here} here, and {node.sizes[axis]} where it was recorded"
