"""nnatomy: one interface to the inside of every Hugging Face transformer."""

from nnatomy.arch_configs import ArchConfig as ArchConfig
from nnatomy.standardized import StandardizedTransformer as StandardizedTransformer
from nnatomy.tracing import Traceable as Traceable
