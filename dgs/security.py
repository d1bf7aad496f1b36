"""Which certificates and tokens each side uses: frozen settings, checked when they are made.

The files themselves are read by `dgs.transport`, and read again when they change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike, fspath
from types import MappingProxyType
from typing import Any, Self

from dgs.errors import ConfigError

__all__ = ["WITHIN_THE_MACHINE", "ClientSecurity", "ServerSecurity"]

_ENVIRONMENT = (
    ("tls_cert", "DGS_TLS_CERT"),
    ("tls_key", "DGS_TLS_KEY"),
    ("tls_ca", "DGS_TLS_CA"),
    ("token_file", "DGS_TOKEN_FILE"),
)

WITHIN_THE_MACHINE = MappingProxyType({variable: "" for _, variable in _ENVIRONMENT})
"""Environment of processes that speak with servers which were started for them, on loopback: what
the user has set there is for other servers."""


def _settle_paths(config: ServerSecurity | ClientSecurity) -> None:
    """Make every path a string, and hold certificate and key to come together."""
    for field in (f.name for f in fields(config) if f.name != "insecure"):
        value = getattr(config, field)
        if not isinstance(value, str | PathLike):
            raise ConfigError(f"{field}={value!r} is not valid: give a path")
        object.__setattr__(config, field, os.fsdecode(fspath(value)))
    if bool(config.tls_cert) != bool(config.tls_key):
        given, missing = ("tls_cert", "tls_key") if config.tls_cert else ("tls_key", "tls_cert")
        raise ConfigError(
            f"{given} is given without {missing}: a certificate and its key go together"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSecurity:
    """Whom a server lets in. By default everyone, and therefore on loopback only.

    Example:
        >>> ServerSecurity(tls_cert="server.pem", tls_key="server.key", tls_ca="ca.pem").tls
        True
    """

    tls_cert: str | PathLike[str] = ""
    """PEM file with the server's certificate, and those between it and the CA, if any."""

    tls_key: str | PathLike[str] = ""
    """PEM file with the certificate's private key, not encrypted."""

    tls_ca: str | PathLike[str] = ""
    """PEM file with the CA of the clients: every client must then show a certificate of it. Without
    a token file, a client may act as the workers that its certificate names."""

    token_file: str | PathLike[str] = ""
    """File with a line ``NAME ROLE sha256:HEX`` per token: every call must then carry one of them.
    A token says which workers its bearer may act as; certificates are then not asked for that."""

    insecure: bool = False
    """Whether to listen beyond loopback although anyone there could read and change the model."""

    def __post_init__(self) -> None:
        """Check every field and their combination."""
        _settle_paths(self)
        if not isinstance(self.insecure, bool):
            raise ConfigError(f"insecure={self.insecure!r} is not valid: give True or False")
        if self.tls_ca and not self.tls_cert:
            raise ConfigError(
                "tls_ca is given without tls_cert and tls_key: a server that checks its clients' "
                "certificates needs one of its own"
            )

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return bool(self.tls_cert)

    @property
    def authenticates(self) -> bool:
        """Whether clients must prove who they are."""
        return bool(self.tls_ca or self.token_file)

    @property
    def identity_files(self) -> tuple[str, str, str]:
        """Return certificate, key and CA; empty where not given."""
        return str(self.tls_cert), str(self.tls_key), str(self.tls_ca)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read ``DGS_TLS_CERT``, ``DGS_TLS_KEY``, ``DGS_TLS_CA`` and ``DGS_TOKEN_FILE``."""
        found: dict[str, Any] = {f: environ.get(variable, "") for f, variable in _ENVIRONMENT}
        return cls(**found)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientSecurity:
    """How a client, such as a worker, reaches its servers. By default in plaintext, as anyone.

    Example:
        >>> ClientSecurity(tls_ca="ca.pem").tls, ClientSecurity().tls
        (True, False)
    """

    tls_ca: str | PathLike[str] = ""
    """PEM file with the CA of the servers. Given it, or a certificate, connections are encrypted,
    and a server must show a certificate of this CA (without it: of a public one) for its name."""

    tls_cert: str | PathLike[str] = ""
    """PEM file with this client's certificate, and those between it and the CA, if any."""

    tls_key: str | PathLike[str] = ""
    """PEM file with the certificate's private key, not encrypted."""

    token_file: str | PathLike[str] = ""
    """File with one token, not readable by every user of the machine. It is sent with each call,
    over TLS or within the machine, and never otherwise."""

    def __post_init__(self) -> None:
        """Check every field and their combination."""
        _settle_paths(self)

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return bool(self.tls_ca or self.tls_cert)

    @property
    def identity_files(self) -> tuple[str, str, str]:
        """Return certificate, key and CA; empty where not given."""
        return str(self.tls_cert), str(self.tls_key), str(self.tls_ca)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read ``DGS_TLS_CERT``, ``DGS_TLS_KEY``, ``DGS_TLS_CA`` and ``DGS_TOKEN_FILE``."""
        found = {field: environ.get(variable, "") for field, variable in _ENVIRONMENT}
        return cls(**found)
