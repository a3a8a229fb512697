"""What the standard names promise, checked on a loaded model.

Four forward passes of two short prompts:

1. reading: every name on every layer fires once and has its shape and finite values, a layer's input is the output of
   the one before, attention rows are distributions over the keys that the query may see (causal, and within the window
   that the config gives the layer), and the inside of the attention is as `internals` says.
2. writing: in each layer the inside of the attention is changed, its output for the first prompt, the MLP's
   output for the second, which has to show; then the layer's output is put back as it was read, after which
   the next layer's input, and at last the final norm's, are as before, bit for bit. (Without a
   final norm to see, the logits.)
3. taking out: in each layer what the token mixer adds to the stream is made zero for the first prompt, what the MLP
   adds for the second; just that has to be missing then. This is a pass of its own, as in the second nothing of a
   layer is as it was for either prompt. What the additions are has been found in the first. Neurons and the routing
   of experts are changed in this pass, too (see `neurons`, `routers`), and weighted values (see `internals`).
4. untraced: to the last layer's output, by a hook of PyTorch's; it is what was read, but for rounding. The second
   prompt is padded on the left, beside a longer one, and so shows whether padding changes anything. (Where it does,
   or there is nothing to pad, the prompts are run once more as they were read.)

A pass has two prompts of 6 tokens, the last of 8: 16 at most. The last shows, too, whether a model is causal that does
not say so.

Then the head: `project_on_vocab(layers_output[-1])` is the logits. None of the passes but the first goes on to the
logits, where that can be helped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.errors import InputError, ValidationError
from nnatomy.validation.algebra import Algebra
from nnatomy.validation.collectors import Each
from nnatomy.validation.cross import CrossAttentions
from nnatomy.validation.internals import Internals
from nnatomy.validation.near import TOLERANCE, distance, is_same
from nnatomy.validation.neurons import Neurons
from nnatomy.validation.parts import check_ends, check_parts
from nnatomy.validation.passes import Passes
from nnatomy.validation.patterns import check_ahead
from nnatomy.validation.reading import Reading
from nnatomy.validation.refusing import refuse, report_of
from nnatomy.validation.report import Findings, Report
from nnatomy.validation.routers import Routers
from nnatomy.validation.untraced import check_untraced
from nnatomy.validation.writing import Writing


def validate(model: Any, allow_failures: bool = False) -> Report:
    """Check the promises on `model` (a StandardizedTransformer), all of them, and learn its head.

    Args:
        allow_failures: have the names that fail refuse to be read, rather than raise.

    Returns:
        What was found, of each name on each layer.

    Raises:
        ValidationError: naming every promise that failed, where, and with which numbers; its `report` has them too.
    """
    if model.device.type == "meta":
        raise InputError(
            "The model is on the meta device, where nothing can be computed: load it with validate='shapes', which checks "
            "the shapes alone, or validate=False."
        )
    with torch.no_grad(), _eval_mode(model.hf_model):
        findings = _check(model)
    report = report_of(model, findings)
    if failures := findings.texts():
        name = type(model.hf_model).__name__
        if not allow_failures:
            listing = "\n".join(f"  - {failure}" for failure in failures)
            raise ValidationError(
                f"{len(failures)} promise(s) of the standard names failed on {name}:\n{listing}\nGive another ArchConfig "
                "(arch_config=...), load with allow_failures=True and use the other names, or load with validate=False "
                "and trust no name above.",
                report,
            )
        for place, reasons in findings.failures.items():
            refuse(model, place, f"it failed validation: {'; '.join(reasons)}")
    return report


def _check(model: Any) -> Findings:
    passes = Passes(model)
    findings = passes.findings
    matrices = (p.dtype for p in (model._anatomy.lm_head or model.hf_model).parameters() if p.is_floating_point())
    # A softmax is taken in float32 at most.
    tolerance = max(TOLERANCE.get(next(matrices, torch.float32), 1e-4), 1e-4)
    internals = Internals(model, findings, tolerance)
    cross = CrossAttentions(model, findings)
    reading = Reading(passes, internals, cross)
    reading.run()
    model._mixers.find()
    check_parts(passes)
    check_ends(passes, reading)
    _refuse(passes)
    if not findings.failures:  # what does not read right cannot be written back
        Writing(passes, internals, reading).run(cross.changes(reading.seen.only))
        _refuse(passes)
        _check_algebra(passes, reading, internals)
        _check_head(passes, reading)
        _refuse(passes)
    check_untraced(passes, reading)
    check_ahead(passes)
    _refuse(passes)
    for place, why in findings.unverified.items():
        refuse(model, place, f"whether it shows could not be checked: {why}")
    return findings


def _refuse(passes: Passes) -> None:
    """What nobody has claimed, but has been inferred, and does not hold, the model does not have."""
    model, failures = passes.model, passes.findings.failures
    for place, (why, *_) in list(failures.items()):
        if place[0] == "padding":  # nobody claims that a model takes it
            refused = refuse(model, place, why)
        else:
            refused = model._anatomy.inferred and refuse(model, place, f"none that passes validation: {why}")
        if refused:
            del failures[place]


def _check_algebra(passes: Passes, reading: Reading, internals: Internals) -> None:
    def read(accessor: Any) -> dict[Module, Tensor]:
        modules = [module for module in accessor.modules if module is not None]
        return {module: accessor.get(reading.seen.only(module, accessor.kind)) for module in modules}

    model = passes.model
    inputs, outputs = read(model.layers_input), read(model.layers_output)
    others = Neurons(model, outputs), Routers(model, outputs | read(model.mlps_output))
    change = partial(internals.change_sums, seen=reading.seen.only)
    kinds = {name: internals.kinds[name] for pair in internals.sums.items() for name in pair}
    beside = [Each(internals.modules, kinds, change)] if kinds else []
    Algebra(model, inputs, outputs, reading.found, passes.findings).check(passes.trace, others, beside)
    for values in reading.found.values():
        values.clear()


def _check_head(passes: Passes, reading: Reading) -> None:
    model, seen = passes.model, reading.seen
    anatomy, head = model._anatomy, model._head
    if not anatomy.gives_logits:
        return
    if model.layers_output.modules[-1] is None:
        head.refused = "it takes what the last layer gives, and there is no layers_output[-1]"
        return
    head.learn_forms({module: seen.only(module, "output") for module in anatomy.ran})
    last = model.layers_output.get(seen.only(model.layers_output.modules[-1], "output"))
    ends = [[] if end is None else seen.first_tensors(end) for end in (anatomy.ln_final, anatomy.lm_head)]
    chain = [last, *ends[0], *ends[1], reading.logits]
    # The short way is the model's own if nothing happens between the modules, bit for bit; a soft cap is next to
    # nothing on small logits, so large ones are seen, too.
    head.short = head.runs_alone and len(chain) == 6 and all(is_same(chain[i], chain[i + 1]) for i in (0, 2, 4))
    head.short = head.short and not head.caps(last[:1, -1:], chain[4][:1, -1:])
    off = distance(model.project_on_vocab(last[:, -1:]), reading.logits[:, -1:])
    holds = off <= TOLERANCE.get(reading.logits.dtype, 1e-4)
    what = f"of layers_output[-1] is not the logits, off by {off:.1e} (relative)"
    passes.expect(holds, "project_on_vocab", None, what, off)


@contextmanager
def _eval_mode(model: Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
