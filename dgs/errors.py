"""Every error the library raises on purpose, each bound to one status code.

An error carries a `code` (a gRPC status name, so that the transport needs no second table) and a
`reason` (a stable word a program may test). A transport ships both, and the client raises the same
class that the server raised: local and remote use fail alike.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AddressInUseError",
    "ChecksumError",
    "ConfigError",
    "DgsError",
    "FencedError",
    "ForbiddenError",
    "ForkError",
    "InternalError",
    "MalformedError",
    "ModelMismatchError",
    "NonFiniteError",
    "NotReadyError",
    "SequenceError",
    "ServerUnavailableError",
    "StateError",
    "TooLargeError",
    "UnauthenticatedError",
    "UnknownWorkerError",
    "ViewError",
    "WrongRunError",
    "error_from_wire",
]


class DgsError(Exception):
    """Root of the library's errors; `code` and `reason` are fixed per class."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "internal"


class ConfigError(DgsError, ValueError):
    """A setting is out of range or contradicts another one; nothing was started."""

    code = "INVALID_ARGUMENT"
    reason = "config"


class MalformedError(DgsError, ValueError):
    """A message does not have the form that WIRE.md prescribes; the state is unchanged."""

    code = "INVALID_ARGUMENT"
    reason = "malformed"


class NonFiniteError(DgsError, ValueError):
    """An update holds NaN or Inf; it was refused whole and the tensor is named."""

    code = "INVALID_ARGUMENT"
    reason = "non-finite"


class ViewError(DgsError, ValueError):
    """The views of a worker leave gaps, overlap or name what the model does not have."""

    code = "INVALID_ARGUMENT"
    reason = "view"


class ChecksumError(DgsError):
    """A frame's checksum does not match its bytes; the same request may be sent again."""

    code = "DATA_LOSS"
    reason = "checksum"


class ModelMismatchError(DgsError, ValueError):
    """The worker's model is not the server's; the first differing tensor is named."""

    code = "FAILED_PRECONDITION"
    reason = "model-mismatch"


class FencedError(DgsError):
    """A newer incarnation of this worker has joined; this one can change nothing any more."""

    code = "FAILED_PRECONDITION"
    reason = "fenced"


class WrongRunError(DgsError):
    """The server is not the one that this worker joined, or was restarted without its state."""

    code = "FAILED_PRECONDITION"
    reason = "wrong-run"


class UnknownWorkerError(DgsError, LookupError):
    """The server keeps no record of this worker: it never joined, or it left."""

    code = "NOT_FOUND"
    reason = "unknown-worker"


class SequenceError(DgsError):
    """A sequence number is neither the last one nor the next one."""

    code = "OUT_OF_RANGE"
    reason = "sequence"


class TooLargeError(DgsError, ValueError):
    """A message, or the number of workers, exceeds a stated limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "too-large"


class UnauthenticatedError(DgsError, PermissionError):
    """One side could not prove to the other who it is; trying again does not help."""

    code = "UNAUTHENTICATED"
    reason = "unauthenticated"


class ForbiddenError(DgsError, PermissionError):
    """The caller is known, and may not do this; trying again does not help."""

    code = "PERMISSION_DENIED"
    reason = "forbidden"


class NotReadyError(DgsError):
    """The server cannot answer yet, but will: ask again. Retryable."""

    code = "UNAVAILABLE"
    reason = "not-ready"


class ServerUnavailableError(DgsError, ConnectionError):
    """A server could not be reached within the stated budget."""

    code = "UNAVAILABLE"
    reason = "unavailable"


class AddressInUseError(DgsError, OSError):
    """Another process listens on the address that a server was told to take."""

    code = "UNAVAILABLE"
    reason = "address-in-use"


class StateError(DgsError, RuntimeError):
    """A state directory cannot be used: it is damaged, in use, or not this server's."""

    code = "FAILED_PRECONDITION"
    reason = "state"


class ForkError(DgsError, RuntimeError):
    """A connection opened before a fork was used in the child."""

    code = "FAILED_PRECONDITION"
    reason = "fork"


class InternalError(DgsError, RuntimeError):
    """A defect of the library; the server's log has the details under the incident's number."""


_BY_REASON: dict[str, type[DgsError]] = {
    cls.reason: cls
    for cls in (
        ConfigError,
        MalformedError,
        NonFiniteError,
        ViewError,
        ChecksumError,
        ModelMismatchError,
        FencedError,
        WrongRunError,
        UnknownWorkerError,
        SequenceError,
        TooLargeError,
        UnauthenticatedError,
        ForbiddenError,
        NotReadyError,
        ServerUnavailableError,
        InternalError,
    )
}


def error_from_wire(reason: str, message: str) -> DgsError:
    """Rebuild the error that a server raised from the two words a transport carries.

    Args:
        reason: the class's `reason`; an unknown one gives `InternalError`.
        message: the text of the error.

    Example:
        >>> error_from_wire("fenced", "worker 'a' was replaced")
        FencedError("worker 'a' was replaced")
    """
    return _BY_REASON.get(reason, InternalError)(message)
