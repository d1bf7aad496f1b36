"""How a server tells over gRPC who calls it: TLS, client certificates, tokens.

What a connection and a call show is made a `Caller`; what that caller may do is the gate's matter.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from dgs.errors import ConfigError, DgsError
from dgs.security import ServerSecurity
from dgs.transport.address import is_loopback, join_address
from dgs.transport.certificates import ExpiryWarning, Identity, WatchedFile, WatchedIdentity
from dgs.transport.gate import ANYONE, Caller, Gate, caller_from_certificate
from dgs.transport.tokens import TokenBook

__all__ = ["Door", "check_exposure"]

_LOG = logging.getLogger("dgs.server")


def check_exposure(host: str, port: int, security: ServerSecurity) -> None:
    """Refuse to let everybody in who can reach the port from other machines.

    Raises:
        ConfigError: says what to do.
    """
    if security.insecure or is_loopback(host):
        return
    where = join_address(host, port)
    if not security.tls:
        raise ConfigError(
            f"{where} can be reached from other machines, and connections would be in plaintext: "
            "give --tls-cert, --tls-key and --tls-ca ('dgs certs' makes them), or --insecure if "
            "everybody who reaches the port may read and change the model (in Python: "
            "security=dgs.ServerSecurity(...))"
        )
    if not security.authenticates:
        raise ConfigError(
            f"{where} can be reached from other machines, and everybody there could read and "
            "change the model: give --tls-ca (client certificates) or --token-file, or --insecure "
            "if that is meant"
        )


class Door:
    """Where callers are known, and let in or turned away.

    Args:
        security: whom to let in.
        gate: says who may do what; None where nobody is asked who they are.

    Raises:
        ConfigError: a file is missing or wrong, or there is nobody to say who may do what.
    """

    def __init__(self, security: ServerSecurity, gate: Gate | None) -> None:
        """Read all files."""
        if security.authenticates and gate is None:
            raise ConfigError("callers are authenticated, but nothing says what they may do")
        self.security = security
        self._gate = gate
        self._identity: WatchedIdentity | None = None
        self._tokens: WatchedFile[TokenBook] | None = None
        if security.tls:
            self._identity = WatchedIdentity(*security.identity_files)
        if security.token_file:
            file = str(security.token_file)
            self._tokens = WatchedFile(file, TokenBook.read, f"the token file {file}")
        self._warning = ExpiryWarning("the server's certificate", _LOG)
        self._count = threading.Lock()
        self._turned_away = 0

    @property
    def turned_away(self) -> int:
        """Return how many calls were refused for who made them."""
        return self._turned_away

    @property
    def certificate_ends_s(self) -> float:
        """Return the Unix time after which the certificate is not valid; 0 without one."""
        return self._identity.current.ends_s if self._identity else 0.0

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return what gRPC needs to encrypt; None for plaintext."""
        identity = self._identity
        if identity is None:
            return None

        given = identity.current

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            identity.refresh()
            if identity.current is given:
                return None
            given = identity.current
            return _configuration(given)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given), fetch, bool(self.security.tls_ca)
        )

    def identify(self, context: grpc.ServicerContext) -> Caller:
        """Return who makes a call; asked before anything of its request is read.

        Raises:
            UnauthenticatedError: it has not shown what it must.
        """
        if self._tokens is not None:
            shown = [v for k, v in context.invocation_metadata() if k == "authorization"]
            with self._counted():
                return self._tokens.content.caller(shown[0] if len(shown) == 1 else None)
        if self.security.tls_ca:
            found = context.auth_context()
            names = [
                [v.decode("utf-8", "replace") for v in found.get(k, ())]
                for k in ("peer_dns", "peer_uri")
            ]
            return caller_from_certificate(*names)
        return ANYONE

    def admit(self, caller: Caller, method: str, request: bytes) -> None:
        """Return if a caller may make a request; asked in the request's turn.

        Raises:
            ForbiddenError: it may not.
        """
        if self._gate is not None:
            with self._counted():
                self._gate.check(caller, method, request)

    def look(self) -> None:
        """Read the certificate again if it has changed, and warn if it ends soon."""
        if self._identity is not None:
            self._identity.refresh()
            self._warning.look(self._identity.current.ends_s)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except DgsError as error:
            with self._count:
                self._turned_away += 1
            _LOG.info("turned away: %s", error)
            raise


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key, identity.certificate)], root_certificates=identity.ca
    )
