"""Who may do what: the check between knowing a caller and carrying out its request.

The core knows no callers, and its log replays requests, so authorisation stands here, before both.
A request that changes or reads a session must come from somebody who may act as that session's
worker; the session is found by the run and the number in the request, as the core will find it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from dgs._proto import parameter_server_pb2 as pb
from dgs.errors import ForbiddenError
from dgs.frame import decode_frame, peek_header
from dgs.messages import parse

__all__ = ["ANYONE", "Caller", "Gate", "Role", "caller_from_certificate", "covers"]

Role = Literal["exchange", "read"]
"""What a caller may do: everything that a worker does, or look only (Status, and PullModel of the
model itself)."""

_WORKER_URI = "dgs:worker/"


@dataclass(frozen=True)
class Caller:
    """Somebody who has proved who it is."""

    label: str
    """For messages and the log."""
    workers: tuple[str, ...]
    """Names of the workers that it may act as; one that ends with ``*`` stands for all that begin
    like it."""
    role: Role

    def may_act_as(self, worker: str) -> bool:
        """Return whether it may open and use sessions of this worker."""
        return self.role == "exchange" and any(covers(name, worker) for name in self.workers)


ANYONE = Caller("anyone", ("*",), "exchange")
"""The caller of a server that authenticates nobody."""


def covers(pattern: str, worker: str) -> bool:
    """Return whether a name, or a prefix that ends with ``*``, is or begins a worker's name.

    Example:
        >>> covers("berlin-*", "berlin-7"), covers("berlin", "berlin-7"), covers("*", "x")
        (True, False, True)
    """
    if pattern.endswith("*"):
        return worker.startswith(pattern[:-1])
    return worker == pattern


def caller_from_certificate(dns: list[str], uris: list[str]) -> Caller:
    """Return who a verified certificate speaks for.

    It may act as the workers that it names, in a URI ``dgs:worker/NAME`` (percent-encoded; a NAME
    that ends with ``*`` is a prefix) or as a DNS name, literally. One that names none may read.

    Args:
        dns: DNS names of the certificate.
        uris: URIs of the certificate.

    Example:
        >>> caller_from_certificate([], ["dgs:worker/berlin-*"]).may_act_as("berlin-7")
        True
    """
    named = [unquote(u.removeprefix(_WORKER_URI)) for u in uris if u.startswith(_WORKER_URI)]
    literal = [name for name in dns if not name.endswith("*")]
    workers = tuple(name for name in (*named, *literal) if name)
    label = "the certificate for " + (", ".join(map(repr, workers)) or "no worker")
    return Caller(label, workers, "exchange" if workers else "read")


class Gate:
    """Hold requests to what their callers may do.

    Args:
        worker_of: returns the name of the worker that requests of a run know by a number, None
            where there is none. It is asked in the request's turn, so that the core then finds the
            same worker.
    """

    def __init__(self, worker_of: Callable[[int, int], str | None]) -> None:
        """Ask nobody yet."""
        self._worker_of = worker_of

    def check(self, caller: Caller, method: str, request: bytes) -> None:
        """Return if the caller may make this request.

        Args:
            caller: who makes it.
            method: name of the RPC.
            request: the whole request.

        Raises:
            ForbiddenError: it may not; nothing was changed.
            MalformedError: the request does not even tell whose it is.
        """
        if caller is ANYONE or _only_looks(method, request):
            return
        if caller.role != "exchange":
            raise ForbiddenError(
                f"{caller.label} may only read (pull, status), and {method} is for workers: give "
                "this worker a token, or certificate, of its own"
            )
        worker = self._worker_in(method, request)
        if worker is None:  # the core says what is to be done about that
            return
        if not caller.may_act_as(worker):
            if method in ("Exchange", "PutModel"):
                decode_frame(request)  # a damaged number is no offence
            allowed = ", ".join(map(repr, caller.workers))
            raise ForbiddenError(
                f"{caller.label} may not act as worker {worker!r}, only as {allowed}: set the "
                "worker's name (DGS_WORKER, worker=...) to one of these, or use its own credentials"
            )

    def _worker_in(self, method: str, request: bytes) -> str | None:
        """Return the worker that a request is made as; None where there is no such session."""
        if method == "Join":
            return parse(pb.JoinRequest, request).worker
        if method == "PullModel":
            pull = parse(pb.PullRequest, request)
            return self._worker_of(pull.run, pull.worker_id)
        if method == "Leave":
            leave = parse(pb.LeaveRequest, request)
            return self._worker_of(leave.run, leave.worker_id)
        header = peek_header(request)
        return self._worker_of(header.run, header.worker_id)


def _only_looks(method: str, request: bytes) -> bool:
    """Return whether a request asks for what everybody may see who may read."""
    if method == "PullModel":
        return not parse(pb.PullRequest, request).incarnation  # the model, not a session's record
    return method == "Status"
