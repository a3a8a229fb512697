"""Every error nnatomy raises, in one tree.

    NnatomyError
    ├── UsageError                  the call is at fault; the text says how to mend it
    │   ├── OutsideTraceError       a value was asked for and no trace is open here
    │   ├── OutOfOrderError         the forward pass is already past that point
    │   ├── NotReachedError         the forward pass ended without coming to that point
    │   │   └── NotCalledError      ..., or a step of it, without that call of the module
    │   ├── NoSuchModuleError       a name that is no submodule            (also AttributeError)
    │   ├── LayerIndexError         a layer that the model does not have   (also IndexError)
    │   ├── AssignmentError         a value that does not fit where it was put
    │   ├── NoSuchRowError          a place of which a report says nothing (also KeyError)
    │   ├── CacheError              a cached value that cannot be given as asked
    │   ├── CaptureError            the body of a `with tracer.invoke(...)` that cannot be run later
    │   ├── RowsError               a value of which nobody can tell which rows are a block's
    │   ├── PlanError               a block of which no plan can be made, or a plan that is none, or does not fit
    │   ├── MissingPackageError     an optional package is not installed    (also ImportError)
    │   └── InputError              a prompt or token ids that cannot be run
    ├── ModelError                  the model is not what was thought
    │   ├── LoadError               the model or its tokenizer could not be loaded
    │   ├── UnknownArchitectureError  no naming config fits the model
    │   ├── ModelChangedError       the model is no longer what its names were found on
    │   ├── NotInThisModelError     a standard name for something this model does not have
    │   └── ValidationError         a loaded model broke a promise of a standard name
    ├── RanksError                  a model split over processes: they are out of step, or one of them has failed
    └── RemoteError                 a model that lives elsewhere: what its server said
        ├── ConnectionLostError     the server cannot be reached, or is gone        (also ConnectionError)
        └── NotRemoteError          something that only a local model can do

An exception of the user's own code or of the model's code is never wrapped in one of these: it
arrives as it was raised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def a(noun: str, article: str = "a") -> str:
    """The noun, or a class's name, behind its article: "an int", "a Tensor", "a UNet".

    Args:
        article: "A" at the beginning of a sentence.
    """
    # (The letters of "ndarray" are said one by one.)
    return f"{article}{'n' * (noun[:1].lower() in {*'aeio'} or noun == 'ndarray')} {noun}"


def a_kind(value: object, article: str = "a") -> str:
    """What kind of thing was given, with its article: of 7 "an int"."""
    return a(type(value).__name__, article)


def counted(count: int, noun: str) -> str:
    """So many of them: "1 image", "2 images"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def check_folder(path: Path) -> None:
    """Raise FileNotFoundError if the folder is not there that a file is to be written into, IsADirectoryError if it is one."""
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the path of a file to write.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r} to write {path.name!r} into: make it first.")


class NnatomyError(Exception):
    """Base of all errors of this library."""


class UsageError(NnatomyError):
    """The call is at fault."""


class OutsideTraceError(UsageError):
    """A value was asked for and no trace is open here."""


class OutOfOrderError(UsageError):
    """The forward pass is already past the point asked for."""


class NotReachedError(UsageError):
    """The forward pass ended without coming to the point asked for."""


class NotCalledError(NotReachedError):
    """The forward pass, or a step of a generation, ended without that call of the module."""


class NoSuchModuleError(UsageError, AttributeError):
    """A name that is no submodule."""


class LayerIndexError(UsageError, IndexError):
    """A layer that the model does not have."""


class AssignmentError(UsageError):
    """A value that does not fit where it was put."""


class NoSuchRowError(UsageError, KeyError):
    """A place of which a report says nothing."""

    def __str__(self) -> str:
        return str(self.args[0])


class CacheError(UsageError):
    """A cached value that cannot be given as asked."""


class CaptureError(UsageError):
    """The body of a `with tracer.invoke(...)` that cannot be taken out of its frame."""


class RowsError(UsageError):
    """A value of a joined batch of which nobody can tell which rows are a block's."""


class PlanError(UsageError):
    """A block of which no plan can be made, a file that is no plan, or a plan that does not fit the model."""


class MissingPackageError(UsageError, ImportError):
    """An optional package that is needed here and not installed."""


#: With the model's type and what it returned.
NO_LOGITS = (
    "{} returned a {}, and not an output with logits: call it without return_dict=False; a model of your own returns "
    "transformers.modeling_outputs.CausalLMOutput(logits=...)."
)


class InputError(UsageError):
    """A prompt or token ids that cannot be run."""


class ModelError(NnatomyError):
    """The model is not what was thought."""


class LoadError(ModelError):
    """The model or its tokenizer could not be loaded."""


class UnknownArchitectureError(ModelError):
    """No naming config fits the model."""


class ModelChangedError(ModelError):
    """The model is no longer what its names were found and checked on."""


class NotInThisModelError(ModelError):
    """A standard name for something this model does not have."""


class ValidationError(ModelError):
    """A loaded model broke a promise of a standard name. `report` has all that was found (`nnatomy.validation.Report`)."""

    def __init__(self, text: str, report: Any = None) -> None:
        super().__init__(text)
        self.report = report


class RanksError(NnatomyError):
    """The processes that a model is split over are not at the same place of the same block, or one of them has failed."""


class RemoteError(NnatomyError):
    """What the server of a remote model has refused, or what has failed there."""


class ConnectionLostError(RemoteError, ConnectionError):
    """The server of a remote model cannot be reached, or is gone."""


class NotRemoteError(RemoteError):
    """Something that only a model in this process can do."""
