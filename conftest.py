"""Runtime shape checks for the whole suite, switched on before the library is imported."""

import sys
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook("nnatomy", "beartype.beartype")
sys.path.insert(0, str(Path(__file__).parent / "tests"))  # `architectures`, `reference`
