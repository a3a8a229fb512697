"""`nnsight.intervention.envoy`."""

from nnatomy.compat.nnsight.envoy import Envoy as Envoy
