"""The weights of a model under standard names: where they are, that they are that, and products of them."""

from nnatomy.weights.accessor import WeightAccessor as WeightAccessor
from nnatomy.weights.accessor import WeightName as WeightName
from nnatomy.weights.circuits import composition_scores as composition_scores
from nnatomy.weights.circuits import ov as ov
from nnatomy.weights.circuits import qk as qk
from nnatomy.weights.factored import FactoredMatrix as FactoredMatrix
from nnatomy.weights.found import Found as Found
from nnatomy.weights.names import ROWS as ROWS
from nnatomy.weights.names import TABLE as TABLE
