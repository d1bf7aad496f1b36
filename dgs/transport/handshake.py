"""Why a connection fails: what gRPC does not tell, found by a handshake of one's own.

To gRPC, most failed handshakes are a closed socket, just like a server that has died. The two need
opposite answers: a dead server is waited for, a wrong certificate is not. So after a failure whose
cause is not plain, one TLS handshake is tried with the same files, and its outcome is put in words.
"""

from __future__ import annotations

import os
import socket
import ssl
import time

from dgs.errors import ConfigError, DgsError, UnauthenticatedError
from dgs.security import ClientSecurity
from dgs.transport.address import split_address
from dgs.transport.certificates import Identity

__all__ = ["diagnose"]

_LIMIT_S = 2.0
_EXPIRED, _NOT_YET, _WRONG_HOST, _WRONG_IP = 10, 9, 62, 64
_TRIES = 2
"""A server may be killed in the middle of a handshake, but hardly twice."""


def diagnose(address: str, security: ClientSecurity, limit_s: float = _LIMIT_S) -> DgsError | None:
    """Try a handshake; return the error that no retry can mend, or None if there is none.

    Args:
        address: ``HOST:PORT`` of a server that could not be reached.
        security: how it was tried.
        limit_s: seconds that each step may take.
    """
    host, port = split_address(address)
    limit_s = max(min(limit_s, _LIMIT_S), 1e-3)
    found: DgsError | None = None
    for _ in range(_TRIES):
        try:
            with socket.create_connection((host, port), timeout=limit_s) as raw:
                raw.settimeout(limit_s)
                if security.tls:
                    found = _with_tls(address, host, raw, security)
                else:
                    found = _without(address, raw)
        except (OSError, ValueError):
            return None
        if found is None:
            return None
    return found


def _without(address: str, raw: socket.socket) -> DgsError | None:
    """Find out whether a server that was spoken to in plaintext speaks TLS."""
    context = _context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with context.wrap_socket(raw):
            pass
    except ssl.SSLError as error:
        if not (error.reason or "").startswith(("TLSV1", "SSLV3", "TLSV13")):  # no TLS alert
            return None
    return ConfigError(
        f"{address} speaks TLS, and was spoken to in plaintext: give --tls-ca (DGS_TLS_CA), and "
        "what else the server asks for"
    )


def _with_tls(
    address: str, host: str, raw: socket.socket, security: ClientSecurity
) -> DgsError | None:
    context = _context()
    if security.tls_ca:
        context.load_verify_locations(os.fspath(security.tls_ca))
    else:
        context.load_default_certs()
    if security.tls_cert:
        files = os.fspath(security.tls_cert), os.fspath(security.tls_key)
        context.load_cert_chain(*files, password=lambda: "")
    try:
        tls = context.wrap_socket(raw, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        return UnauthenticatedError(f"{address}: {_verdict(error, host, security)}")
    except ssl.SSLError as error:
        if (error.reason or "") in ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL"):
            return ConfigError(
                f"{address} does not speak TLS, and was spoken to in TLS: start it with --tls-cert "
                "and --tls-key, or take DGS_TLS_CA and DGS_TLS_CERT away"
            )
        return None
    # Under TLS 1.3 the server judges the client's certificate only now. One that accepts it sends
    # its settings at once; gRPC's sends no alert otherwise, it just closes.
    with tls:
        try:
            accepted = bool(tls.recv(1))
        except TimeoutError:
            return None
        except OSError:
            accepted = False
    return None if accepted else UnauthenticatedError(f"{address}: {_refusal(security)}")


def _refusal(security: ClientSecurity) -> str:
    if not security.tls_cert:
        return (
            "the server asks for a client certificate, and none was shown: give --tls-cert and "
            "--tls-key (DGS_TLS_CERT, DGS_TLS_KEY)"
        )
    refused = f"the server does not accept this client's certificate {security.tls_cert}: it "
    if Identity.read(*security.identity_files).ends_s < time.time():
        return refused + "has expired; replace the file"
    return refused + "is not of the CA that the server trusts (its --tls-ca)"


def _verdict(error: ssl.SSLCertVerificationError, host: str, security: ClientSecurity) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "the server's certificate has expired: replace it on the server"
    if code == _NOT_YET:
        return "the server's certificate is not valid yet: check the clocks of both machines"
    if code in (_WRONG_HOST, _WRONG_IP):
        return (
            f"the server's certificate is not for {host!r}: reach it under a name that is in the "
            "certificate, or make one for this name"
        )
    ca = os.fspath(security.tls_ca) or "the public CAs"
    return f"the server's certificate is not of the CA in {ca} ({error.verify_message})"


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context
