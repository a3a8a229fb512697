"""API keys: a file with the SHA-256 of each key, one a line, and behind it the role; `#` begins a remark."""

from __future__ import annotations

import os
import secrets
from base64 import b64decode
from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from nnatomy.errors import InputError

#: What the owner of a key may do: `use` has sessions of its own; `admin` sees and closes those of others too.
USE, ADMIN = ROLES = ("use", "admin")


class Client(NamedTuple):
    """Who asks.

    Attributes:
        role: one of `ROLES`.
        key: the first letters of the SHA-256 of the key, by which it is found in the key file; "" without keys.
        owner: the whole of it: whose results are kept for whom.
    """

    role: str
    key: str
    owner: str = ""

    @property
    def is_admin(self) -> bool:
        return self.role == ADMIN


class Keys:
    """The keys that clients may have, by their SHA-256, each with its role; none means that everybody may do everything."""

    def __init__(self, roles: Mapping[str, str] | None = None) -> None:
        self._roles = [(one.encode(), role) for one, role in (roles or {}).items()]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Those of a file. Raises InputError if it cannot be read, or holds something else."""
        try:
            lines = [line.partition("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The key file {path} cannot be read: {error}") from None
        found: dict[str, str] = {}
        for line in filter(None, lines):
            digest, role = line[0].lower(), line[1] if len(line) > 1 else USE
            if len(line) > 2 or len(digest) != 64 or set(digest) - set("0123456789abcdef") or role not in ROLES:
                found = {}
                break
            found[digest] = role
        if not found:
            raise InputError(
                f"The key file {path} has to hold the SHA-256 of each key, one a line, and behind it `use` (or nothing) or "
                f"`admin`; --new-key {path} adds one."
            )
        return cls(found)

    def __bool__(self) -> bool:
        return bool(self._roles)

    def client(self, authorization: str | None) -> Client | None:
        """Who asks with that `Authorization` (a bearer's key, or the password of a browser); None if nobody who may.

        Each hash is compared in the time that all take.
        """
        if not self._roles:
            return Client(ADMIN, "")
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() == "basic":
            key = _password(key)
        digest = sha256(key.strip().encode(errors="replace")).hexdigest()
        found = [role for one, role in self._roles if compare_digest(digest.encode(), one)]
        return Client(found[0], digest[:8], digest) if found and kind.lower() in ("bearer", "basic") else None


def _password(encoded: str) -> str:
    try:
        return b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def new_key(path: Path, role: str = USE) -> str:
    """A new key, whose hash and role are put at the end of the file, which only its owner can read."""
    key = secrets.token_urlsafe(32)
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
        file.write(f"{sha256(key.encode()).hexdigest()} {role}\n")
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
