"""Where nnsight has what is named here, for imports of it."""

from nnatomy.compat.nnsight.intervention import envoy as envoy
from nnatomy.compat.nnsight.intervention import interleaver as interleaver
from nnatomy.compat.nnsight.intervention import tracing as tracing
