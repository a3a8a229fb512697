"""`nnsight.intervention.interleaver`: the errors that scripts catch."""

from nnatomy.errors import NotReachedError, OutOfOrderError


class Mediator:
    """The errors of order, by nnsight's names."""

    #: Asked for too late, or never come: for `except` and `pytest.raises`.
    MissedProviderError = (OutOfOrderError, NotReachedError)
    OutOfOrderError = OutOfOrderError
