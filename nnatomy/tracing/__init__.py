"""The tracer for any `torch.nn.Module`: `core`, with several blocks on one pass, lasting edits, attached modules, sources."""

from nnatomy.tracing.source import ModuleView as ModuleView
from nnatomy.tracing.trace import Trace as Trace
from nnatomy.tracing.trace import Traceable as Traceable
