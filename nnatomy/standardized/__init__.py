"""`StandardizedTransformer`: any Hugging Face causal language model under the standard names."""

from nnatomy.standardized.accessors import LayerAccessor as LayerAccessor
from nnatomy.standardized.activation_cache import ActivationCache as ActivationCache
from nnatomy.standardized.transformer import StandardizedTransformer as StandardizedTransformer
