from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgs.errors import FencedError, InternalError, ServerUnavailableError, StateError
from dgs.transport import GuardedHandler, LocalTransport, Method
from tests.helpers.echo import EchoHandler


class Broken:
    """A handler with every defect that a guard must hold back."""

    def handle(self, method: str, request: bytes) -> bytes:
        return None  # type: ignore[return-value]

    def max_request_bytes(self, method: str) -> int:
        if method == "Leave":
            raise KeyError("secret")
        return 10


@pytest.mark.parametrize("method", [Method.LEAVE, Method.JOIN])
def test_a_handler_that_breaks_its_contract_is_an_internal_error(method: Method) -> None:
    with pytest.raises(InternalError, match=r"^internal error, incident \w+$"):
        LocalTransport(Broken()).call(method, b"", timeout_s=1.0)


def test_transports_that_share_a_guard_call_the_handler_one_at_a_time() -> None:
    handler = EchoHandler()
    guard = GuardedHandler(handler)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(LocalTransport(guard).call, Method.STATUS, b"block", timeout_s=9.0)
        assert handler.entered.wait(9.0)
        second = pool.submit(LocalTransport(guard).call, Method.STATUS, b"next", timeout_s=9.0)
        handler.leave.set()
        assert (first.result(9.0), second.result(9.0)) == (b"block", b"next")
    assert handler.overlaps == 0


def test_a_request_nobody_waits_for_is_left_alone() -> None:
    handler = EchoHandler()
    with pytest.raises(ServerUnavailableError, match="gone"):
        GuardedHandler(handler).handle("Exchange", b"x", lambda: False)
    assert handler.calls == []


def test_a_closed_guard_never_calls_the_handler_again() -> None:
    handler = EchoHandler()
    guard = GuardedHandler(handler)
    guard.close()
    with pytest.raises(ServerUnavailableError, match="stopping"):
        guard.handle("Exchange", b"x")
    assert handler.calls == []


class Journal:
    """A journal that keeps what it is asked to when the test lets it."""

    def __init__(self) -> None:
        self.position = 0
        self.waited: list[int] = []
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.failure: Exception | None = None

    def wait(self, position: int) -> None:
        self.waited.append(position)
        self.asked.set()
        assert self.gate.wait(9.0)
        if self.failure is not None:
            raise self.failure


class Noting(EchoHandler):
    """A handler of which every call changes something."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal

    def handle(self, method: str, request: bytes) -> bytes:
        self.journal.position += 1
        if request == b"refuse":
            raise FencedError("refused")
        return super().handle(method, request)


def test_no_reply_leaves_before_the_journal_has_what_it_tells_of() -> None:
    journal = Journal()
    guard = GuardedHandler(Noting(journal), journal)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(guard.handle, "Exchange", b"x")
        assert journal.asked.wait(9.0)
        assert not reply.done()
        journal.gate.set()
        assert reply.result(9.0) == b"x"
    assert journal.waited == [1]


def test_others_have_their_turn_while_one_waits_for_the_journal() -> None:
    journal = Journal()
    handler = Noting(journal)
    guard = GuardedHandler(handler, journal)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(guard.handle, "Exchange", b"x")
        assert journal.asked.wait(9.0)
        assert guard.handle("Status", b"y") == b"y"
        assert not waiting.done()
        journal.gate.set()
        waiting.result(9.0)
    assert journal.waited == [1]  # Status tells of nothing that could be lost


def test_a_refusal_waits_as_well() -> None:
    journal = Journal()
    journal.gate.set()
    with pytest.raises(FencedError):
        GuardedHandler(Noting(journal), journal).handle("Exchange", b"refuse")
    assert journal.waited == [1]


def test_what_cannot_be_kept_is_not_acknowledged_and_may_be_sent_again() -> None:
    journal = Journal()
    journal.gate.set()
    journal.failure = StateError("cannot write /secret/log: No space left on device")
    guard = GuardedHandler(Noting(journal), journal)
    for request in (b"x", b"refuse"):
        with pytest.raises(ServerUnavailableError, match="cannot keep what it is sent") as raised:
            guard.handle("Exchange", request)
        assert "secret" not in str(raised.value)


def test_a_defect_of_the_journal_acknowledges_nothing() -> None:
    journal = Journal()
    journal.gate.set()
    journal.failure = ZeroDivisionError("secret")
    with pytest.raises(InternalError, match="incident"):
        GuardedHandler(Noting(journal), journal).handle("Exchange", b"x")


def test_a_turn_keeps_requests_waiting() -> None:
    handler = EchoHandler()
    guard = GuardedHandler(handler)
    with ThreadPoolExecutor(1) as pool:
        with guard.turn():
            reply = pool.submit(guard.handle, "Exchange", b"x")
            assert handler.calls == []
        assert reply.result(9.0) == b"x"
