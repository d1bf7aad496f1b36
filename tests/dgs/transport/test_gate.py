"""Who may do what, request by request, without a network."""

from __future__ import annotations

import numpy as np
import pytest

from dgs._proto import parameter_server_pb2 as pb
from dgs.errors import ChecksumError, ForbiddenError, MalformedError
from dgs.frame import FrameKind, Header, encode_frame
from dgs.transport.gate import ANYONE, Caller, Gate, caller_from_certificate, covers

RUN = 9
WORKERS = {1: "a", 2: "b"}
A = Caller("the token of 'a'", ("a",), "exchange")
READER = Caller("the token of 'viewer'", ("*",), "read")


def gate() -> Gate:
    return Gate(lambda run, number: WORKERS.get(number) if run == RUN else None)


def frame(number: int, run: int = RUN) -> bytes:
    header = Header(
        kind=FrameKind.MODEL,
        values="float32",
        worker_id=number,
        member=0,
        shard=0,
        run=run,
        incarnation=1,
        size=1,
        nnz=1,
    )
    return encode_frame(header, np.zeros(1, "<f4"))


def requests_of(number: int, run: int = RUN) -> dict[str, bytes]:
    session = {"run": run, "worker_id": number, "incarnation": 1}
    return {
        "Join": pb.JoinRequest(worker=WORKERS.get(number, "c")).SerializeToString(),
        "PutModel": frame(number, run),
        "Exchange": frame(number, run),
        "PullModel": pb.PullRequest(**session).SerializeToString(),
        "Leave": pb.LeaveRequest(**session).SerializeToString(),
    }


@pytest.mark.parametrize("method", requests_of(1))
def test_a_worker_uses_its_own_sessions_and_no_others(method: str) -> None:
    gate().check(A, method, requests_of(1)[method])
    with pytest.raises(ForbiddenError, match="may not act as worker 'b', only as 'a'"):
        gate().check(A, method, requests_of(2)[method])
    with pytest.raises(ForbiddenError, match="may only read"):
        gate().check(READER, method, requests_of(1)[method])
    gate().check(ANYONE, method, requests_of(2)[method])


@pytest.mark.parametrize("method", ["PutModel", "Exchange", "PullModel", "Leave"])
def test_a_session_that_is_not_there_is_left_to_the_core(method: str) -> None:
    gate().check(A, method, requests_of(3)[method])
    gate().check(A, method, requests_of(2, run=RUN + 1)[method])  # of a server that was replaced


def test_whoever_is_known_may_look() -> None:
    for caller in (A, READER):
        gate().check(caller, "Status", b"")
        gate().check(caller, "PullModel", pb.PullRequest(run=9).SerializeToString())


def test_a_damaged_number_is_no_offence() -> None:
    damaged = bytearray(frame(1))
    damaged[8] = 2
    with pytest.raises(ChecksumError):
        gate().check(A, "Exchange", bytes(damaged))


@pytest.mark.parametrize("method", requests_of(1))
def test_what_does_not_tell_whose_it_is_goes_no_further(method: str) -> None:
    for noise in (b"\xff", b"DGSF", b"\xff" * 100):
        with pytest.raises((MalformedError, ForbiddenError)):
            gate().check(A, method, noise)


def test_certificates_name_workers_by_uri_or_literally_by_dns_name() -> None:
    caller = caller_from_certificate(
        ["w0", "*"], ["dgs:worker/site-*", "dgs:worker/two%20words", "https://w1", "dgs:worker/"]
    )
    assert caller.workers == ("site-*", "two words", "w0")
    assert caller.may_act_as("site-1")
    assert not caller.may_act_as("w1")
    nobody = caller_from_certificate([], [])
    assert nobody.role == "read"
    assert not nobody.may_act_as("")


@pytest.mark.parametrize(
    ("pattern", "worker", "expected"),
    [
        ("a", "a", True),
        ("a", "ab", False),
        ("a*", "ab", True),
        ("*", "", True),
        ("a*b", "ab", False),
    ],
)
def test_only_a_star_at_the_end_stands_for_more(pattern: str, worker: str, expected: bool) -> None:
    assert covers(pattern, worker) is expected
