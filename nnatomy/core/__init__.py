"""Look into any `torch.nn.Module` while it runs: the forward thread, points, traces, caches.

README.md in this folder is the map.
"""

from nnatomy.core.block import Block as Block
from nnatomy.core.cache import Cache as Cache
from nnatomy.core.points import Collector as Collector
from nnatomy.core.points import Slot as Slot
from nnatomy.core.points import Tap as Tap
from nnatomy.core.trace import Trace as Trace
from nnatomy.core.trace import Traceable as Traceable
from nnatomy.core.views import ModuleView as ModuleView
