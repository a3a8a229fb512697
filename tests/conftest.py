"""Runtime shape checks for the whole suite, switched on before the library is imported."""

from jaxtyping import install_import_hook

install_import_hook("nnatomy", "beartype.beartype")
