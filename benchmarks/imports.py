"""What importing nnatomy costs beside PyTorch and Transformers. `python benchmarks/imports.py [processes]`

Each figure is that of processes of their own, in seconds of the user's CPU time, which other programs on the machine change less
than they do the clock: the least, and the median. The import is measured behind those of PyTorch's and Transformers' modules
that it needs; these are what it has brought into a process that imports it alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

_OURS = """
import sys
from resource import RUSAGE_SELF, getrusage
for name in {names!r}:
    __import__(name)
before = getrusage(RUSAGE_SELF).ru_utime
{code}
print(getrusage(RUSAGE_SELF).ru_utime - before)
"""
_NEEDED = (
    "import sys, nnatomy; nnatomy.StandardizedTransformer; "
    "print(*(one for one in sys.modules if one.partition('.')[0] in ('torch', 'transformers')))"
)
_COMMAND = """
import subprocess, sys
from resource import RUSAGE_CHILDREN, getrusage
subprocess.run([sys.executable, "-m", "nnatomy", {option!r}], stdout=subprocess.DEVNULL, check=True)
print(getrusage(RUSAGE_CHILDREN).ru_utime)
"""


def run(code: str) -> str:
    """What a process of its own prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def needed() -> list[str]:
    """The modules of PyTorch and Transformers that nnatomy needs, in the order in which they came."""
    return [name for name in run(_NEEDED).split() if not name.startswith("torch._C.") and "torch.ops" not in name]


def times(code: str, processes: int = 9) -> list[float]:
    """What so many processes print, sorted."""
    return sorted(float(run(code)) for _ in range(processes))


def rows(processes: int = 9) -> dict[str, list[float]]:
    """The figures, by what is measured."""
    after = ["torch", "transformers", "transformers.modeling_utils", "transformers.generation.utils"]
    ours = "import nnatomy; nnatomy.StandardizedTransformer"
    found = {
        "import nnatomy": times(_OURS.format(names=after, code="import nnatomy"), processes),
        "StandardizedTransformer, behind all that it needs": times(_OURS.format(names=needed(), code=ours), processes),
        "StandardizedTransformer, behind modeling_utils, generation": times(
            _OURS.format(names=after, code=ours), processes
        ),
    }
    for option in ("--version", "--help"):
        found[f"nnatomy {option}, whole process"] = times(_COMMAND.format(option=option), processes)
    return found


if __name__ == "__main__":
    for what, seconds in rows(int(sys.argv[1]) if sys.argv[1:] else 9).items():
        sys.stdout.write(f"{what}: {seconds[0]:.3f} s (median {statistics.median(seconds):.3f})\n")
