"""API keys: a file with the SHA-256 of each, one a line; `#` begins a remark."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address
from pathlib import Path

from nnatomy.errors import InputError


class Keys:
    """The keys that clients may have; none means that everybody may come."""

    def __init__(self, hashes: Sequence[str] = ()) -> None:
        self._hashes = [one.encode() for one in hashes]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Those of a file. Raises InputError if it cannot be read, or holds something else."""
        try:
            lines = [line.partition("#")[0].strip().lower() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The key file {path} cannot be read: {error}") from None
        hashes = [line for line in lines if line]
        if not hashes or any(len(one) != 64 or set(one) - set("0123456789abcdef") for one in hashes):
            raise InputError(
                f"The key file {path} has to hold the SHA-256 of each key, one a line; --new-key {path} adds one."
            )
        return cls(hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def allow(self, authorization: str | None) -> bool:
        """Whether a request with that `Authorization` may come. Each hash is compared in the time that all take."""
        if not self._hashes:
            return True
        kind, _, key = (authorization or "").partition(" ")
        given = sha256(key.strip().encode()).hexdigest().encode()
        found = [compare_digest(given, one) for one in self._hashes]
        return kind.lower() == "bearer" and any(found)


def new_key(path: Path) -> str:
    """A new key, whose hash is put at the end of the file, which only its owner can read."""
    key = secrets.token_urlsafe(32)
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
        file.write(f"{sha256(key.encode()).hexdigest()}\n")
    return key


def check_address(host: str, keys: Keys) -> None:
    """Raise InputError for an address that others can reach, where no key is asked for."""
    try:
        inside = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        inside = False
    if not inside and not keys:
        raise InputError(
            f"--host {host}: others can reach that address, so clients have to have a key: nnatomy serve --new-key FILE makes "
            "one, and --key-file FILE asks for it."
        )
