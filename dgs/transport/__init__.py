"""Ways to carry a request to a server shard and bring the reply back.

`base` names the contract. `local` is the server in the same process, `grpc_client` and
`grpc_server` the network, `retry` patience around any of them. The gRPC modules are imported only
by those who use them, so that simulations and tests need no network library.
"""

from dgs.transport.base import Method, Traffic, Transport
from dgs.transport.guard import GuardedHandler, Handler
from dgs.transport.local import LocalTransport
from dgs.transport.retry import RetryingTransport

__all__ = [
    "GuardedHandler",
    "Handler",
    "LocalTransport",
    "Method",
    "RetryingTransport",
    "Traffic",
    "Transport",
]
