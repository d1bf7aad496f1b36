"""Bearer tokens: random words that clients send, of which a server keeps the hashes only.

A token has 256 random bits, so a plain hash protects it: nobody can try them all. The server's file
has one line per token, ``NAME ROLE sha256:HEX``; empty lines and those that begin with ``#`` do not
count. NAME is the worker that the bearer may act as, or a prefix of such names and ``*``.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from dgs.config import is_worker_name
from dgs.errors import ConfigError, UnauthenticatedError
from dgs.transport.certificates import read_private
from dgs.transport.gate import Caller, Role

__all__ = ["TokenBook", "bearer", "make_token", "read_token", "token_line"]

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_SCHEME = "Bearer "


def make_token() -> str:
    """Return a new token.

    Example:
        >>> len(make_token()) > 40, make_token() != make_token()
        (True, True)
    """
    return f"dgs_{secrets.token_urlsafe(32)}"


def bearer(token: str) -> str:
    """Return the value of the metadata ``authorization`` that carries a token."""
    return _SCHEME + token


def _hash(token: str) -> str:
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


def token_line(name: str, role: str, token: str) -> str:
    """Return what a server's file says of a token.

    Args:
        name: of the worker, or a prefix of names and ``*``; for ``read`` any label.
        role: ``exchange`` or ``read``.
        token: the token itself; it cannot be found from the line.

    Raises:
        ConfigError: no worker can have that name, or there is no such role.

    Example:
        >>> token_line("berlin-*", "exchange", "t" * 43)[:30]
        'berlin-* exchange sha256:80383'
    """
    _check_entry(name, role)
    return f"{name} {role} {_hash(token)}"


def _check_entry(name: str, role: str) -> None:
    if not is_worker_name(name) or name != name.strip() or name.startswith("#"):
        raise ConfigError(f"{name!r} is no name of a worker: give at most 128 printable characters")
    if role not in get_args(Role):
        raise ConfigError(f"{role!r} is no role: choose one of {', '.join(get_args(Role))}")


def read_token(path: str) -> str:
    """Read a client's token from its file.

    Raises:
        ConfigError: there is none, more than one, or every user of the machine can read it.
    """
    words = read_private(path, "the token file").decode("utf-8", "replace").split()
    if len(words) == 3 and _HASH.fullmatch(words[2]):
        raise ConfigError(f"{path} is a server's token file: clients need the token itself")
    if len(words) != 1 or not _TOKEN.fullmatch(words[0]):
        raise ConfigError(f"{path} does not hold one token, as 'dgs token' makes them")
    return words[0]


class TokenBook:
    """The tokens that a server takes, by their hashes.

    Args:
        entries: hash and caller of each token.
    """

    def __init__(self, entries: Sequence[tuple[str, Caller]]) -> None:
        """Keep the entries."""
        self._entries = tuple(entries)

    @classmethod
    def read(cls, path: str) -> TokenBook:
        """Read a server's token file.

        Raises:
            ConfigError: it cannot be read; names the first line that is wrong.
        """
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the token file {path}: {error}") from error
        entries = [
            _entry(f"{path}, line {number}", line.strip())
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.strip().startswith("#")
        ]
        if not entries:
            raise ConfigError(f"the token file {path} holds no token; 'dgs token' makes one")
        return cls(entries)

    def caller(self, authorization: str | None) -> Caller:
        """Return who sent a token.

        Args:
            authorization: the metadata of that name; None if there was none.

        Raises:
            UnauthenticatedError: there was no token, or it is not in the book.
        """
        if authorization is None:
            raise UnauthenticatedError(
                "this server asks for a token, and none was sent: set DGS_TOKEN_FILE, --token-file "
                "or token_file=... to the file with this client's"
            )
        presented = _hash(authorization.removeprefix(_SCHEME).strip())
        found: Caller | None = None
        for known, caller in self._entries:  # all of them, so that time tells nothing
            if hmac.compare_digest(known, presented):
                found = caller
        if found is None:
            raise UnauthenticatedError(
                "the server does not know this token: it was withdrawn, or is another server's"
            )
        return found


def _entry(place: str, line: str) -> tuple[str, Caller]:
    parts = line.rsplit(None, 2)
    if len(parts) != 3 or not _HASH.fullmatch(parts[2]):
        raise ConfigError(
            f"{place} is not 'NAME ROLE sha256:HEX'; 'dgs token' writes such lines, and the token "
            "itself belongs on the client only"
        )
    name, role, hashed = parts
    try:
        _check_entry(name, role)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return hashed, Caller(f"the token of {name!r}", (name,), cast(Role, role))
