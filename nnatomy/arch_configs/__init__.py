"""The naming of each architecture: from a Hugging Face model to its standard modules."""

from nnatomy.arch_configs.config import ArchConfig as ArchConfig
from nnatomy.arch_configs.example import accepts as accepts
from nnatomy.arch_configs.example import beside_tokens as beside_tokens
from nnatomy.arch_configs.example import example_inputs as example_inputs
from nnatomy.arch_configs.example import has_decoder as has_decoder
from nnatomy.arch_configs.example import input_device as input_device
from nnatomy.arch_configs.example import main_input as main_input
from nnatomy.arch_configs.example import needed as needed
from nnatomy.arch_configs.example import num_tokens as num_tokens
from nnatomy.arch_configs.example import takes as takes
from nnatomy.arch_configs.example import text_config as text_config
from nnatomy.arch_configs.families import FAMILIES as FAMILIES
from nnatomy.arch_configs.outputs import logits_of as logits_of
from nnatomy.arch_configs.outputs import tensors_in as tensors_in
from nnatomy.arch_configs.outputs import with_logits as with_logits
from nnatomy.arch_configs.resolve import Anatomy as Anatomy
from nnatomy.arch_configs.resolve import Dimensions as Dimensions
from nnatomy.arch_configs.resolve import causal_lm as causal_lm
from nnatomy.arch_configs.resolve import dimensions as dimensions
from nnatomy.arch_configs.resolve import resolve as resolve
from nnatomy.arch_configs.resolve import rows_of as rows_of
from nnatomy.arch_configs.windows import masks_windows as masks_windows
from nnatomy.arch_configs.windows import visible_keys as visible_keys
