"""A call that lasts long is told of while it lasts."""

from __future__ import annotations

import logging
import threading
from random import Random

import pytest

from dgs.config import RetryConfig
from dgs.transport import Method, RetryingTransport, Traffic
from dgs.transport.slow import NOTE_AFTER_S, SlowAttempts
from tests.dgs.transport.conftest import VirtualTime

PATIENCE_S = 20.0


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_an_attempt_is_told_of_once_after_ten_seconds_and_when_it_is_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    time = VirtualTime()
    slow = SlowAttempts("ps:7070", time.clock)
    slow.stop()  # no thread of its own looks, so the test alone decides when
    with caplog.at_level(logging.WARNING, logger="dgs.transport"), slow.attempt("Exchange"):
        time.now_s = NOTE_AFTER_S - 0.1
        slow.look()
        assert told(caplog) == []
        time.now_s = NOTE_AFTER_S
        slow.look()
        time.now_s = 23.4
        slow.look()
    assert told(caplog) == [
        "server ps:7070 has not answered Exchange for 10 s; still waiting "
        "(is it busy, stopped, or cut off?)",
        "server ps:7070 answered Exchange after 23.4 s",
    ]


def test_short_and_ended_attempts_are_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    time = VirtualTime()
    slow = SlowAttempts("ps:7070", time.clock)
    slow.stop()
    with caplog.at_level(logging.WARNING, logger="dgs.transport"):
        with slow.attempt("Exchange"):
            time.now_s = 9.0
        time.now_s = 99.0
        slow.look()
        with slow.attempt("Status"):
            slow.look()
    assert told(caplog) == []


class Hung:
    """A transport whose server answers only once the caller has been told that it does not."""

    address = "ps:7070"

    def __init__(self, time: VirtualTime, told: threading.Event) -> None:
        self.traffic = Traffic()
        self._time = time
        self._told = told

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        self._time.now_s += NOTE_AFTER_S
        return b"told" if self._told.wait(PATIENCE_S) else b"silent"

    def close(self) -> None:
        pass


class Telling(logging.Handler):
    """Set an event at the first message."""

    def __init__(self, told: threading.Event) -> None:
        super().__init__()
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.set()


def test_a_server_that_hangs_is_told_of_while_the_call_waits() -> None:
    time, told = VirtualTime(), threading.Event()
    handler, log = Telling(told), logging.getLogger("dgs.transport")
    transport = RetryingTransport(
        Hung(time, told), RetryConfig(), random=Random(0), clock=time.clock, wait=time.wait
    )
    log.addHandler(handler)
    try:
        assert transport.call(Method.EXCHANGE, b"", timeout_s=60.0) == b"told"
    finally:
        log.removeHandler(handler)
        transport.close()


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "forgotten"])
def test_all_calls_of_a_transport_share_one_thread_that_ends_with_it(closed: bool) -> None:
    def lookers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "dgs-slow-attempts"]

    before = set(lookers())
    time, told = VirtualTime(), threading.Event()
    told.set()
    transport = RetryingTransport(
        Hung(time, told), RetryConfig(), random=Random(0), clock=time.clock, wait=time.wait
    )
    assert set(lookers()) == before
    for _ in range(3):
        transport.call(Method.EXCHANGE, b"", timeout_s=60.0)
    (looker,) = set(lookers()) - before
    if closed:
        transport.close()
    else:
        del transport
    looker.join(PATIENCE_S)
    assert not looker.is_alive()
