"""Models split over several processes by Transformers' tensor parallelism: the same block on every rank, whole values under every name."""

from nnatomy.parallel.plan import tp_plan as tp_plan
from nnatomy.parallel.ranks import Ranks as Ranks
from nnatomy.parallel.run import LockstepRun as LockstepRun
from nnatomy.parallel.split import Split as Split
