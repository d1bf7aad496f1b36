from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from dgs.errors import InternalError, ServerUnavailableError
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
