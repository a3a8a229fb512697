"""Making a plan: a block is run on several prompts and in several steps, and what it did in all of them is the plan."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from nnatomy.blocks.capture import Body, Names
from nnatomy.core.frames import is_ours
from nnatomy.errors import AssignmentError, InputError, NnatomyError, NotReachedError, PlanError, UsageError, counted
from nnatomy.plans.expected import finite, measured
from nnatomy.plans.graph import Block, Node, Part
from nnatomy.plans.identity import identity
from nnatomy.plans.plan import Plan
from nnatomy.plans.recorder import Recorder
from nnatomy.plans.replay import Replay
from nnatomy.plans.sizes import Differ, Recording, for_any_model, united
from nnatomy.standardized.prompt_trace import tokens_of
from nnatomy.tracing.attach import Attachment

#: How many steps behind the first are looked at, if nothing asks for more; and how many at most.
_STEPS, _MOST_STEPS = 3, 64
_FOR_ONE = (
    "so that a plan of it would be true for this prompt alone. Write it with functions of the values (zeros_like, [:, -1]), or "
    "record(..., any_prompt=False) for a plan for this prompt."
)
_TEXT = "The quick brown fox jumps over the lazy dog."
Edit = Callable[[], Any]


def record(model: Any, block: Any, prompt: Any, any_prompt: bool) -> Any:
    """See `StandardizedTransformer.record`."""
    if model._blocks.is_open_here:
        raise UsageError("record(...) is called outside of traces: it runs the model.")
    if hasattr(block, "edits"):
        if block.hf_model is not model.hf_model:
            raise UsageError("record(edited): it is a view of another model.")
        edits = block.edits
    elif block is None or not callable(block):
        text = prompt if block is None else block
        return RecordBlock(model, text, any_prompt)
    else:
        edits = (*model.edits, block)
    plan = Plan()
    make(plan, model.without_edits(), edits, prompt, any_prompt)
    return plan


class RecordBlock:
    """`with model.record(prompt) as plan:`, whose body is taken from the source."""

    def __init__(self, model: Any, prompt: Any, any_prompt: bool) -> None:
        self._model, self._prompt, self._any_prompt = model, prompt, any_prompt

    def __enter__(self) -> Plan:
        self._body = Body()
        self._plan = Plan()
        self._body.skip()
        return self._plan

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        body = self._body
        skipped = body.left(kind)
        body.forget()
        if skipped or kind is None:
            edits = (*self._model.edits, lambda: body.run(Names(body.look_up)))
            make(self._plan, self._model.without_edits(), edits, self._prompt, self._any_prompt)
        return skipped


def make(plan: Plan, model: Any, edits: tuple[Any, ...], prompt: Any, any_prompt: bool) -> None:
    """Fill a plan.

    Args:
        model: a view without edits.
        edits: what is recorded, each on what those before it have done.
    """
    if not edits:
        raise UsageError("record(edited): it has no edits.")
    if attached := [one for one in edits if isinstance(one, Attachment)]:
        raise PlanError(
            f"{attached[0].name} is an attached module: its code is no data. Record a block that does the same with tensors."
        )
    if model.config.is_encoder_decoder:
        raise PlanError("Of encoder-decoders no plans are made yet.")
    text, ids = _prompt(model, prompt)
    before = model
    for edit in edits:
        if isinstance(edit, Replay) and edit.plan.only is None:
            _take_over(plan, edit)
        else:
            _Making(plan, before, edit, ids, any_prompt).make()
        before = before.edit(Replay(plan, len(plan.blocks) - 1, model))
    plan.about = identity(model)
    for its_text, its_ids in [(text, ids), (None, _other(model, ids))][: 1 if plan.only else 2]:
        replays = [Replay(plan, i, model) for i in range(len(plan.blocks))]
        plan.prompts.append({"text": its_text, "ids": its_ids, "numbers": measured(model, replays, its_ids)})


def _prompt(model: Any, prompt: Any) -> tuple[str | None, list[int]]:
    """The text, if it is one, and the token ids."""
    if prompt is None:
        prompt = _TEXT if model.tokenizer is not None else list(range(1, min(10, model.vocab_size)))
    inputs = model.prepare(prompt)
    ids = inputs.get("input_ids")
    if ids is None or len(ids) != 1 or inputs.keys() - {"input_ids", "attention_mask", "position_ids"}:
        raise InputError(
            "record(...) takes one prompt: a text, a chat, or token ids. (A plan is for any number of them.)"
        )
    return (prompt if isinstance(prompt, str) else None), ids[0].tolist()


def _other(model: Any, ids: list[int]) -> list[int]:
    """Another prompt, of another length and first and last token."""
    longer = [*ids[::-1], *ids[:3]]
    try:
        model.prepare(longer)
    except InputError:  # beyond the model's positions
        return ids[-2::-1] or ids
    return longer


def _take_over(plan: Plan, replay: Replay) -> None:
    """A block of another plan."""
    name = {old: _constant(plan, tensor, old) for old, tensor in replay.plan.constants.items()}
    if plan.about and plan.dtype != replay.plan.dtype:
        raise PlanError("The plans that the view has were recorded on models of different dtypes.")
    plan.about = replay.plan.about
    parts = [
        Part(part.first, [_named(node, name.get(node.name, node.name)) for node in part.nodes], part.why)
        for part in replay.block.parts
    ]
    plan.blocks.append(Block(parts, replay.block.together))


def _named(node: Node, name: str) -> Node:
    return node if node.kind != "constant" else Node("constant", name)


def _constant(plan: Plan, tensor: Tensor, name: str = "") -> str:
    """Its name in the plan, which has it once; that if it is free."""
    for its_name, known in plan.constants.items():
        if known.dtype == tensor.dtype and torch.equal(known, tensor):
            return its_name
    if not name or name in plan.constants:
        name = next(one for one in (f"{name or 'v'}{i}" for i in count()) if one not in plan.constants)
    plan.constants[name] = tensor
    return name


class _Making:
    """One block of a plan.

    Args:
        model: the view that it is recorded on.
    """

    def __init__(self, plan: Plan, model: Any, edit: Edit, ids: list[int], any_prompt: bool) -> None:
        self._plan, self._model, self._edit = plan, model, edit
        self._ids, self._any_prompt = ids, any_prompt
        self._steps = _STEPS

    def make(self) -> None:
        plan, ids = self._plan, self._ids
        plan.about = plan.about or {"dtype": str(self._model.hf_model.dtype).removeprefix("torch.")}
        first, outcome = self._trace(ids)
        groups = [(0, [first])]
        why = ""
        if self._any_prompt:
            other, others_outcome = self._elsewhere(_other(self._model, ids))
            groups = [(0, [first, other, *self._on_a_short_one()])]
            self._united(groups[0][1])
            groups, why = self._with_steps(groups)
        parts = [Part(at, self._named(self._united(some), some[0])) for at, some in groups]
        if self._any_prompt:
            parts += [Part(len(self._seen), [], why)] if why else []
        else:
            plan.only = plan.only or {"ids": ids, "why": "it was recorded with any_prompt=False"}
            parts.append(Part(1, []))
        if not any(part.nodes for part in parts):
            raise PlanError("The block changes nothing: it assigns no value, and changes none in place.")
        plan.blocks.append(Block(parts))
        self._compare(ids, outcome)
        if self._any_prompt:
            self._compare(_other(self._model, ids), others_outcome)
            plan.blocks[-1].together = all(self._is_together(part.nodes) for part in parts if part.nodes)

    def _trace(self, ids: list[int]) -> tuple[Recording, Tensor]:
        """The block in one forward pass, and what that comes to."""
        model = self._model
        with torch.no_grad(), model.trace(ids) as tracer:
            recording = self._record(tracer)
            outcome = _outcome(model)
        return recording, outcome

    def _elsewhere(self, ids: list[int]) -> tuple[Recording, Tensor]:
        """The same on another prompt, on which a block that is for the one may fail."""
        try:
            return self._trace(ids)
        except PlanError:
            raise
        except (NnatomyError, RuntimeError, IndexError, ValueError) as error:
            raise PlanError(
                f"{_line_of(error)}: on another prompt, of {counted(len(ids), 'token')}, the block fails ({error}), {_FOR_ONE}"
            ) from None

    def _on_a_short_one(self) -> list[Recording]:
        """The same on half the prompt, if the block does not need more positions than that."""
        try:
            return [self._trace(self._ids[len(self._ids) // 2 :])[0]] if len(self._ids) > 1 else []
        except (NnatomyError, RuntimeError, IndexError, ValueError):
            return []

    def _record(self, tracer: Any) -> Recording:
        model = self._model
        arguments, total = model._root_inputs("record")
        tokens = tokens_of(arguments)
        recorder = Recorder(model, tracer.block, self._any_prompt)
        with recorder.on():
            self._edit()
        if recorder.only and self._plan.only is None:
            self._plan.only = {"ids": self._ids, "why": recorder.only}
        self._steps = min(max(self._steps, recorder.steps), _MOST_STEPS)
        sizes = {"seq": total if tokens is None else tokens.shape[1], "key": total}
        return Recording(recorder.done(), recorder.constants, sizes)

    def _united(self, recordings: list[Recording]) -> list[Node]:
        try:
            return united(recordings)
        except Differ as error:
            raise PlanError(f"{error}, {_FOR_ONE}") from None

    def _with_steps(self, groups: list[tuple[int, list[Recording]]]) -> tuple[list[tuple[int, list[Recording]]], str]:
        """With the steps of a generation, each in the group of the one before if it does the same; and why the block fails, if so."""
        model, self._seen = self._model, list[Recording]()
        can = getattr(model.hf_model, "can_generate", None)
        if can is None or not can() or not model.causal:
            return groups, ""
        why = ""
        steps = 0
        while steps < self._steps and not why:  # again, if the block says that it needs more
            steps = self._steps
            self._seen, why = self._generate(steps)
        for step, one in enumerate(self._seen):
            if step:
                try:
                    united([*groups[-1][1], one])
                    groups[-1][1].append(one)
                except Differ:
                    groups.append((step, [one]))
        if not why and len(groups) > 1 and len(groups[-1][1]) == 1:
            raise PlanError(
                f"The block does something else in step {groups[-1][0]} of a generation than in the one before, and nobody can "
                "tell what in later ones."
            )
        return groups, why

    def _generate(self, steps: int) -> tuple[list[Recording], str]:
        seen: list[Recording] = []
        options = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1, "do_sample": False, "num_beams": 1}
        with torch.no_grad(), self._model.generate(self._ids, **options) as tracer:
            for step in tracer.iter[:]:
                try:
                    seen.append(self._record(tracer))
                except PlanError:
                    raise
                except (NotReachedError, AssignmentError, RuntimeError, IndexError) as error:
                    if not step:
                        raise
                    return seen, f"the block itself fails here: {error}"
        return seen, ""

    def _named(self, nodes: list[Node], recording: Recording) -> list[Node]:
        """With the plan's names for constants."""
        names = {}
        for node in nodes:
            if node.kind == "constant":
                names[id(node)] = _constant(self._plan, recording.constants[node.args[0]], node.name)
        nodes = [_named(node, names.get(id(node), "")) for node in nodes]
        return for_any_model(nodes, self._model.hf_model.dtype, {self._model.device, torch.device("cpu")})

    # That the plan does what the block does.

    def _replay(self, parts: list[Part], together: bool = False) -> Replay:
        replay = Replay(self._plan, len(self._plan.blocks) - 1, self._model)
        replay.block = Block(parts, together)
        return replay

    def _compare(self, ids: list[int], wanted: Tensor) -> None:
        edited = self._model.edit(self._replay(self._plan.blocks[-1].parts))
        with torch.no_grad(), edited.trace(ids):
            found = _outcome(edited)
        if not torch.equal(found.nan_to_num(7), wanted.nan_to_num(7)):
            raise PlanError(
                "What was recorded of the block does not give, done again, what the block gives: it changes the model in a way that "
                "is not seen (a hook, a module's own name, memory shared with a value)."
            )

    def _is_together(self, nodes: list[Node]) -> bool:
        """Whether they may be done to a batch at once: seen on two prompts of one length."""
        both = [self._ids, self._ids[::-1]]
        if both[0] == both[1] or any(node.kind == "skip" and node.args[2] is not None for node in nodes):
            return False
        changes: list[dict[str, Tensor]] = []
        for together in (True, False):
            replay = self._replay([Part(0, nodes)], together)
            replay.seen = {}
            try:
                with torch.no_grad():
                    self._model.edit(replay).trace(both).run()
            except PlanError:
                return False
            seen = {point: one for point, one in replay.seen.items() if one[1] is not None}
            changes.append({point: finite(after) - finite(before) for point, (before, after) in seen.items()})
        for point, change in changes[1].items():
            other = changes[0][point]
            if not torch.equal(change.flatten(1).any(1), other.flatten(1).any(1)):
                return False
            if (change - other).abs().max() > 1e-3 * change.abs().max():
                return False
        return True


def _outcome(model: Any) -> Tensor:
    """What a pass comes to: the logits, or the last layer's output of a model without a head."""
    found: Tensor = model.layers_output[-1] if "logits" in model._refused else model.logits
    return found


def _line_of(error: BaseException) -> str:
    """The innermost line of its traceback that is neither ours nor torch's."""
    found, at = "?", error.__traceback__
    while at is not None:
        name = at.tb_frame.f_globals.get("__name__", "")
        if not is_ours(at.tb_frame) and not name.startswith("torch."):
            found = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
        at = at.tb_next
    return found
