"""nnsight's names on the models of this library: scripts run with the import changed.

`from nnatomy.compat.nnsight import LanguageModel` in the place of `from nnsight import LanguageModel`. docs/from_nnsight.md has
the table of what works as it stands, what differs, and what is refused with what to write.
"""

from nnatomy.compat.nnsight import intervention as intervention
from nnatomy.compat.nnsight import util as util
from nnatomy.compat.nnsight.config import CONFIG as CONFIG
from nnatomy.compat.nnsight.envoy import Envoy as Envoy
from nnatomy.compat.nnsight.language import LanguageModel as LanguageModel
from nnatomy.compat.nnsight.language import TransformersModel as TransformersModel
from nnatomy.compat.nnsight.model import NNsight as NNsight
from nnatomy.compat.nnsight.saving import mounted
from nnatomy.compat.nnsight.saving import save as save

#: `with session():`, around traces: everything has `.save()` within.
session = mounted
