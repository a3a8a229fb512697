"""Models that Transformers has split over several processes: whole values under every name, on each of them."""

from nnatomy.parallel.plan import tp_plan as tp_plan
from nnatomy.parallel.ranks import Ranks as Ranks
from nnatomy.parallel.run import LockstepRun as LockstepRun
from nnatomy.parallel.run import SplitRun as SplitRun
from nnatomy.parallel.split import Split as Split
