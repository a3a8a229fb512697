"""nnterp's names on the models of this library: scripts run with the import changed.

`from nnatomy.compat.nnterp import StandardizedTransformer` in the place of `from nnterp import StandardizedTransformer`. Most of
nnterp's names are the main library's own; docs/from_nnterp.md has the table of what differs.
"""

from nnatomy.compat.nnterp import interventions as interventions
from nnatomy.compat.nnterp import nnsight_utils as nnsight_utils
from nnatomy.compat.nnterp import prompt_utils as prompt_utils
from nnatomy.compat.nnterp import rename_utils as rename_utils
from nnatomy.compat.nnterp.nnsight_utils import ModuleAccessor as ModuleAccessor
from nnatomy.compat.nnterp.rename_utils import get_rename_dict as get_rename_dict
from nnatomy.compat.nnterp.standardized_transformer import StandardizedTransformer as StandardizedTransformer
