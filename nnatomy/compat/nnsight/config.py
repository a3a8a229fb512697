"""`CONFIG`: what nnsight's scripts set. Here nothing depends on it but what is said below."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NoReturn

from nnatomy.errors import UsageError


class Config:
    """Settings under nnsight's names.

    Attributes:
        APP: kept as set, and not used: tracebacks show the user's lines, `.save()` is there in traces alone.
        API: kept as set, and not used: servers are those of nnatomy (`nnatomy serve`), by NNATOMY_SERVER and NNATOMY_API_KEY.
    """

    def __init__(self) -> None:
        self.APP = SimpleNamespace(DEBUG=False, REMOTE_LOGGING=True, PYMOUNT=True)
        self.API = SimpleNamespace(HOST=None, APIKEY=None)

    def set_default_api_key(self, api_key: str) -> NoReturn:  # noqa: ARG002
        """Raises UsageError: there is no NDIF here."""
        raise UsageError(
            "CONFIG.set_default_api_key: traces are sent to a server of nnatomy's own: set model.server and model.api_key, or "
            "NNATOMY_SERVER and NNATOMY_API_KEY, and write model.trace(..., remote=True). See docs/remote.md."
        )


CONFIG = Config()
