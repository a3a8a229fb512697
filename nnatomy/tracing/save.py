"""`tensor.save()`, for scripts written for nnsight or nnterp.

Values read in a trace are ordinary tensors and need no saving. So that such scripts run unchanged,
the first trace gives `torch.Tensor` a method `save` that returns the tensor. (An attribute of each
tensor read would be narrower, but would miss `model.logits.argmax(-1).save()`, would be pickled with
the tensor, and would mark the model's own parameters.) Where nnsight is loaded, its `object.save` is
called, so that tensors saved in its traces are saved.
"""

import torch


def mount_save() -> None:
    if "save" not in torch.Tensor.__dict__:
        torch.Tensor.save = _save  # type: ignore[attr-defined]


def _save(self: torch.Tensor) -> torch.Tensor:
    """Return the tensor: a value read in an nnatomy trace is there after the block as it is."""
    nnsight_save = getattr(object, "save", None)
    if nnsight_save is None:
        return self
    try:
        return nnsight_save(self)
    except ValueError:  # nnsight's: "save() was called outside a trace", of its own
        return self
