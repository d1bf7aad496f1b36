"""From what a user writes for a server to transports that reach it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from random import Random
from typing import cast

from dgs.config import RetryConfig
from dgs.errors import ConfigError
from dgs.security import ClientSecurity
from dgs.transport.base import Transport
from dgs.transport.guard import Handler
from dgs.transport.local import LocalTransport
from dgs.transport.options import KEEPALIVES, QUIET_GRPC
from dgs.transport.retry import RetryingTransport

__all__ = ["Servers", "connect", "split_addresses"]

Servers = str | Handler | Transport | Sequence[str | Handler | Transport]
"""An address (or several, separated by commas), a `ParameterServer` in this process, a transport;
or a list of them, one per shard. A transport belongs to one optimizer, which closes it."""


def split_addresses(text: str) -> list[str]:
    """Split a comma-separated list of addresses.

    Raises:
        ConfigError: the list is empty.
    """
    addresses = [a.strip() for a in text.split(",") if a.strip()]
    if not addresses:
        raise ConfigError(f"{text!r} names no server; give HOST:PORT[,HOST:PORT...]")
    return addresses


def connect(
    servers: Servers | None,
    retry: RetryConfig,
    environ: Mapping[str, str] = os.environ,
    *,
    security: ClientSecurity | None = None,
) -> list[Transport]:
    """Make one transport per shard; nothing is opened before the first call.

    Args:
        servers: where the shards are, in the order that all workers use; None reads
            ``DGS_SERVER``.
        retry: budgets of the connections over a network.
        environ: where ``DGS_SERVER`` and, if need be, `security` are read from.
        security: certificates and token for the connections over a network; None reads
            ``DGS_TLS_CA``, ``DGS_TLS_CERT``, ``DGS_TLS_KEY`` and ``DGS_TOKEN_FILE``.

    Raises:
        ConfigError: no server is named, an address is not HOST:PORT, or a file of `security` is
            missing or wrong.
    """
    if servers is None:
        text = environ.get("DGS_SERVER", "")
        if not text:
            raise ConfigError(
                "no server: pass server='HOST:PORT', set DGS_SERVER, or start the script with "
                "'dgs launch'"
            )
        servers = text
    if isinstance(servers, str):
        servers = split_addresses(servers)
    listed = servers if isinstance(servers, Sequence) else [servers]
    if not listed:
        raise ConfigError("the list of servers is empty")
    return [_transport(s, retry, security, environ) for s in listed]


def _transport(
    server: object,
    retry: RetryConfig,
    security: ClientSecurity | None,
    environ: Mapping[str, str],
) -> Transport:
    if isinstance(server, str):
        if security is None:
            security = ClientSecurity.from_environment(environ)
        os.environ.setdefault(*QUIET_GRPC)  # read when grpc is imported, so it comes first
        from dgs.transport.grpc_client import GrpcTransport  # not needed without a network

        inner = GrpcTransport(server, keepalive=KEEPALIVES[retry.keepalive], security=security)
        return RetryingTransport(inner, retry, random=Random())
    if isinstance(server, Transport):
        return server
    if hasattr(server, "handle"):
        local = LocalTransport(cast(Handler, server))
        return RetryingTransport(local, retry, random=Random())  # it may wait for its model
    raise ConfigError(
        f"server={server!r} is not valid: give 'HOST:PORT', a ParameterServer or a Transport"
    )
