"""The tracer for any `torch.nn.Module`: `core`, with several blocks on one pass, lasting edits, attached modules, sources."""

from nnatomy.tracing.trace import Trace as Trace
from nnatomy.tracing.traceable import Traceable as Traceable
from nnatomy.tracing.views import ModuleView as ModuleView
