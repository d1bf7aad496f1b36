"""What a client shows of itself over gRPC: certificates for its channel, a token for its calls."""

from __future__ import annotations

import logging

import grpc

from dgs.errors import ConfigError
from dgs.security import ClientSecurity
from dgs.transport.address import is_loopback, split_address
from dgs.transport.certificates import ExpiryWarning, WatchedFile, WatchedIdentity
from dgs.transport.tokens import bearer, read_token

__all__ = ["Credentials"]

_LOG = logging.getLogger("dgs.transport")

Metadata = tuple[tuple[str, str], ...]


class Credentials:
    """The files of one client, for one server.

    Args:
        address: ``HOST:PORT`` of the server.
        security: which files.

    Raises:
        ConfigError: a file is missing or wrong, or a token would travel in plaintext.
    """

    def __init__(self, address: str, security: ClientSecurity) -> None:
        """Read all files."""
        self.security = security
        self._identity: WatchedIdentity | None = None
        self._token: WatchedFile[str] | None = None
        if security.tls:
            self._identity = WatchedIdentity(*security.identity_files)
        if security.token_file:
            host, _ = split_address(address)
            if not security.tls and not is_loopback(host):
                raise ConfigError(
                    f"the token in {security.token_file} is not sent to {address} in plaintext: "
                    "give --tls-ca (DGS_TLS_CA, tls_ca=...) to encrypt"
                )
            file = str(security.token_file)
            self._token = WatchedFile(file, read_token, f"the token file {file}")
        self._warning = ExpiryWarning(f"this client's certificate {security.tls_cert}", _LOG)

    def refresh(self) -> bool:
        """Return whether the certificates have changed, so that a new channel would use others."""
        return self._identity is not None and self._identity.refresh()

    def channel(self, target: str, options: tuple[tuple[str, int], ...]) -> grpc.Channel:
        """Make a channel with the certificates as they are now."""
        identity = self._identity
        if identity is None:
            return grpc.insecure_channel(target, options=options)
        identity.refresh()
        current = identity.current
        shown = grpc.ssl_channel_credentials(current.ca, current.key, current.certificate)
        return grpc.secure_channel(target, shown, options=options)

    def metadata(self) -> Metadata | None:
        """Return what each call carries; warns if the certificate ends soon."""
        if self._identity is not None:
            self._warning.look(self._identity.current.ends_s)
        if self._token is None:
            return None
        return (("authorization", bearer(self._token.content)),)
