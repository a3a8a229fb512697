"""`nnsight.intervention.tracing`."""

from nnatomy.compat.nnsight.intervention.tracing import util as util
