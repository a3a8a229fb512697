"""Tiny random models of every causal-LM type of transformers."""

from zoo.build import TYPES as TYPES
from zoo.build import build as build
from zoo.build import build_class as build_class
from zoo.build import config as config
from zoo.build import ids as ids
from zoo.build import loaded as loaded
from zoo.build import shared as shared
from zoo.build import vocab_size as vocab_size
from zoo.exceptions import NO_GRADIENTS as NO_GRADIENTS
from zoo.exceptions import NOT_BUILT as NOT_BUILT
from zoo.exceptions import NOT_CAUSAL as NOT_CAUSAL
from zoo.exceptions import REASONS as REASONS
from zoo.exceptions import REFUSED_CLASSES as REFUSED_CLASSES
from zoo.exceptions import WITHOUT_GRADIENT as WITHOUT_GRADIENT
