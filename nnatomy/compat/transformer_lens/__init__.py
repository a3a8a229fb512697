"""TransformerLens's names on any model: `HookedTransformer`, hook names, `run_with_cache`, `run_with_hooks`, `ActivationCache`.

Models are untouched Hugging Face models, as of `from_pretrained_no_processing`: nothing is folded or centered. What a hook is
given is a copy; what it returns, or has changed in place, goes on. `docs/from_transformer_lens.md` has the table of names.
"""

from nnatomy.compat.transformer_lens import head_detector as head_detector
from nnatomy.compat.transformer_lens import patching as patching
from nnatomy.compat.transformer_lens import utils as utils
from nnatomy.compat.transformer_lens.cache import ActivationCache as ActivationCache
from nnatomy.compat.transformer_lens.factored_matrix import FactoredMatrix as FactoredMatrix
from nnatomy.compat.transformer_lens.hook_points import HookPoint as HookPoint
from nnatomy.compat.transformer_lens.hook_points import get_act_name as get_act_name
from nnatomy.compat.transformer_lens.model import Config as Config
from nnatomy.compat.transformer_lens.model import HookedTransformer as HookedTransformer
from nnatomy.compat.transformer_lens.svd import SVDInterpreter as SVDInterpreter
from nnatomy.standardized.elsewhere import HOOKS as HOOKS
