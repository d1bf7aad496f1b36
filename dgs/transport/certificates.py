"""Certificates and keys in files: checked when they are read, read again when they change."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from dgs.errors import ConfigError

__all__ = ["ExpiryWarning", "Identity", "WatchedFile", "WatchedIdentity", "read_private"]

_LOG = logging.getLogger("dgs.transport")
_WARN_BEFORE_S = 7 * 86400.0
_WARN_EVERY_S = 86400.0
_FOREVER_S = float("inf")

Stamp = tuple[int, int, int] | None
T = TypeVar("T")


def _stamp(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error


def read_private(path: str, what: str) -> bytes:
    """Read a file that is nobody else's business.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        ConfigError: it cannot be read, or every user of the machine can.
    """
    content = _read(path, what)
    if os.stat(path).st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(
            f"{what} {path} can be read or written by every user of this machine: chmod 600 {path}"
        )
    return content


@dataclass(frozen=True)
class Identity:
    """What one side shows of itself, and whose certificates it takes; all PEM."""

    certificate: bytes | None
    key: bytes | None
    ca: bytes | None
    ends_s: float
    """Unix time after which the certificate is not valid; infinite without one."""

    @classmethod
    def read(cls, cert: str, key: str, ca: str) -> Identity:
        """Read and check files; an empty path stands for none.

        Raises:
            ConfigError: a file cannot be read, is no PEM, or the key is another certificate's.
        """
        roots = _read(ca, "the CA certificate") if ca else None
        if roots is not None:
            _certificates(roots, ca)
        if not cert:
            return cls(None, None, roots, _FOREVER_S)
        chain, secret = _read(cert, "the certificate"), read_private(key, "the private key")
        first = _certificates(chain, cert)[0]
        if _public_key(secret, key) != first.public_key().public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        ):
            raise ConfigError(f"{key} is not the private key of the certificate {cert}")
        return cls(chain, secret, roots, first.not_valid_after_utc.timestamp())


def _certificates(content: bytes, path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ConfigError(f"{path} holds no PEM certificate") from error


def _public_key(content: bytes, path: str) -> bytes:
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no PEM private key without a password") from error
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


class WatchedFile(Generic[T]):
    """What is made of a file, made again when the file changes.

    Args:
        path: the file.
        make: returns it, given the path.
        what: it is, for messages.

    Raises:
        ConfigError: from `make`, at the start; later on the last good one stays.
    """

    def __init__(self, path: str, make: Callable[[str], T], what: str) -> None:
        """Read the file."""
        self._path = path
        self._make = make
        self._what = what
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._content = make(path)

    @property
    def content(self) -> T:
        """Return what is made of the file as it is now, or as it last was good."""
        with self._lock:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._content = self._make(self._path)
                except ConfigError as error:
                    _LOG.warning("%s is not read again: %s", self._what, error)
            return self._content


class WatchedIdentity:
    """The identity in some files, read again when one of them changes.

    Args:
        cert: the certificate's file, or empty.
        key: its private key's file, or empty.
        ca: the CA's file, or empty.

    Raises:
        ConfigError: the files are not good at the start; later on the last good ones stay.
    """

    def __init__(self, cert: str, key: str, ca: str) -> None:
        """Read the files."""
        self._paths = cert, key, ca
        self._lock = threading.Lock()
        self._stamps = self._look()
        self._current = Identity.read(*self._paths)
        self._told = ""

    @property
    def current(self) -> Identity:
        """Return the identity that the files last gave."""
        return self._current

    def refresh(self) -> bool:
        """Read the files if they have changed; return whether what they hold is another identity.

        While they do not fit each other, which is so for a moment when they are replaced one after
        the other, the old identity stays, and they are looked at again the next time.
        """
        with self._lock:
            stamps = self._look()
            if stamps == self._stamps:
                return False
            try:
                found = Identity.read(*self._paths)
            except ConfigError as error:
                if str(error) != self._told:
                    self._told = str(error)
                    _LOG.warning("the old certificate stays in use: %s", error)
                return False
            self._stamps, self._told = stamps, ""
            if found == self._current:
                return False
            self._current = found
            _LOG.info("the certificates have been read again")
            return True

    def _look(self) -> tuple[Stamp, ...]:
        return tuple(_stamp(path) if path else None for path in self._paths)


class ExpiryWarning:
    """Say in the log, a week ahead and then daily, that a certificate ends.

    Args:
        whose: names it.
        logger: where it is said.
        clock: tells Unix time.
    """

    def __init__(
        self, whose: str, logger: logging.Logger, clock: Callable[[], float] = time.time
    ) -> None:
        """Nothing has been said yet."""
        self._whose = whose
        self._logger = logger
        self._clock = clock
        self._next_s = 0.0

    def look(self, ends_s: float) -> None:
        """Warn if it is time to.

        Args:
            ends_s: Unix time after which the certificate is not valid.
        """
        now = self._clock()
        if ends_s - now > _WARN_BEFORE_S or now < self._next_s:
            return
        self._next_s = now + _WARN_EVERY_S
        left_s = ends_s - now
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends_s))
        if left_s <= 0:
            self._logger.warning("%s has expired (%s): replace it now", self._whose, when)
        else:
            days = left_s / 86400
            self._logger.warning(
                "%s expires in %.1f days (%s): replace the file, it is read again by itself",
                self._whose,
                days,
                when,
            )
