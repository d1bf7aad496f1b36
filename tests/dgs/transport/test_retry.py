"""Retries, in virtual time: nothing here waits."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from itertools import repeat
from random import Random
from threading import Thread

import pytest

from dgs.config import RetryConfig
from dgs.errors import (
    ChecksumError,
    ConfigError,
    DgsError,
    FencedError,
    InternalError,
    MalformedError,
    NotReadyError,
    SequenceError,
    ServerUnavailableError,
    UnknownWorkerError,
)
from dgs.transport import Method, RetryingTransport, Traffic
from dgs.transport.address import UnresolvedNameError
from tests.dgs.transport.conftest import VirtualTime


class Scripted:
    """A transport whose attempts end as written, each after `cost_s` of virtual time."""

    def __init__(
        self, script: Iterable[DgsError | bytes], time: VirtualTime, cost_s: float = 0.0
    ) -> None:
        self._script = iter(script)
        self._time = time
        self._cost_s = cost_s
        self.requests: list[bytes] = []
        self.timeouts: list[float] = []
        self.closed = False

    @property
    def address(self) -> str:
        return "ps:7070"

    @property
    def traffic(self) -> Traffic:
        return Traffic()

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        self.requests.append(request)
        self.timeouts.append(timeout_s)
        self._time.now_s += min(self._cost_s, timeout_s)
        outcome = next(self._script)
        if isinstance(outcome, bytes):
            return outcome
        raise outcome

    def close(self) -> None:
        self.closed = True


def retrying(
    inner: Scripted, time: VirtualTime, seed: int = 0, **config: float
) -> RetryingTransport:
    return RetryingTransport(
        inner, RetryConfig(**config), random=Random(seed), clock=time.clock, wait=time.wait
    )


def down() -> ServerUnavailableError:
    return ServerUnavailableError("ps:7070: connection refused")


@pytest.mark.parametrize("error", [down(), NotReadyError("no model yet"), ChecksumError("torn")])
def test_what_time_can_mend_is_sent_again_with_the_same_bytes(error: DgsError) -> None:
    time = VirtualTime()
    inner = Scripted([error, error, b"reply"], time)
    assert retrying(inner, time).call(Method.EXCHANGE, b"same", timeout_s=60.0) == b"reply"
    assert inner.requests == [b"same"] * 3


@pytest.mark.parametrize(
    "cls",
    [ConfigError, MalformedError, FencedError, SequenceError, UnknownWorkerError],
)
def test_a_refusal_for_good_is_raised_at_once(cls: type[DgsError]) -> None:
    time = VirtualTime()
    inner = Scripted([cls("no"), b"never"], time)
    with pytest.raises(cls, match="no"):
        retrying(inner, time).call(Method.EXCHANGE, b"", timeout_s=60.0)
    assert len(inner.requests) == 1


@pytest.mark.parametrize("cls", [ChecksumError, InternalError])
def test_a_fault_is_retried_three_times_then_raised_as_it_is(cls: type[DgsError]) -> None:
    time = VirtualTime()
    inner = Scripted(repeat(cls("again")), time)
    with pytest.raises(cls, match="again"):
        retrying(inner, time).call(Method.EXCHANGE, b"", timeout_s=600.0)
    assert len(inner.requests) == 4


@pytest.mark.parametrize("budget_s", [0.01, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("cost_s", [0.0, 0.3, 200.0])
def test_the_budget_bounds_attempts_and_waits_together(budget_s: float, cost_s: float) -> None:
    time = VirtualTime()
    inner = Scripted(repeat(down()), time, cost_s)
    with pytest.raises(ServerUnavailableError):
        retrying(inner, time).call(Method.EXCHANGE, b"", timeout_s=budget_s)
    assert time.now_s <= budget_s + 1e-9
    assert all(timeout_s <= 120.0 for timeout_s in inner.timeouts)
    if cost_s == 0.0:
        assert time.now_s >= 0.7 * budget_s


def test_giving_up_tells_the_address_the_time_the_attempts_the_cause_and_what_to_check() -> None:
    time = VirtualTime()
    inner = Scripted(repeat(down()), time)
    with pytest.raises(ServerUnavailableError) as caught:
        retrying(inner, time).call(Method.EXCHANGE, b"", timeout_s=30.0)
    text = str(caught.value)
    for part in ("ps:7070", "29.0 s", f"{len(inner.requests)} attempts", "refused", "Check"):
        assert part in text
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Error: ") == 1, shown


def test_waits_double_up_to_the_longest_and_are_spread_over_a_half() -> None:
    time = VirtualTime()
    inner = Scripted(repeat(down()), time)
    with pytest.raises(ServerUnavailableError):
        retrying(inner, time, first_wait_s=0.1, longest_wait_s=5.0).call(
            Method.EXCHANGE, b"", timeout_s=100.0
        )
    full = [min(5.0, 0.1 * 2**i) for i in range(len(time.waits))]
    for wait, longest in list(zip(time.waits, full, strict=True))[:-1]:
        assert longest / 2 <= wait <= longest
    assert len(set(time.waits)) == len(time.waits)


def test_the_same_seed_gives_the_same_waits_and_another_seed_others() -> None:
    def waits(seed: int) -> list[float]:
        time = VirtualTime()
        with pytest.raises(ServerUnavailableError):
            retrying(Scripted(repeat(down()), time), time, seed).call(
                Method.JOIN, b"", timeout_s=30.0
            )
        return time.waits

    assert waits(1) == waits(1)
    assert waits(1) != waits(2)


def test_an_outage_is_logged_once_when_it_begins_and_once_when_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    time = VirtualTime()
    transport = retrying(Scripted([down(), down(), down(), b"", b""], time), time)
    with caplog.at_level(logging.WARNING, logger="dgs.transport"):
        transport.call(Method.EXCHANGE, b"", timeout_s=60.0)
        transport.call(Method.EXCHANGE, b"", timeout_s=60.0)
    begin, end = (record.getMessage() for record in caplog.records)
    assert begin == "server ps:7070: connection refused; trying again"
    assert end == f"server ps:7070 is back after {time.now_s:.1f} s"


def unresolved() -> UnresolvedNameError:
    return UnresolvedNameError("ps:7070: the name does not resolve")


def test_a_name_that_has_never_resolved_is_given_up_within_three_seconds() -> None:
    time = VirtualTime()
    inner = Scripted(repeat(unresolved()), time)
    with pytest.raises(UnresolvedNameError, match=r"name does not resolve\. Check the spelling"):
        retrying(inner, time).call(Method.JOIN, b"", timeout_s=300.0)
    assert 1.5 < time.now_s <= 3.0
    assert len(inner.requests) > 2


def test_a_name_that_has_resolved_before_gets_the_whole_budget() -> None:
    time = VirtualTime()
    inner = Scripted([b"", *repeat(unresolved(), 40), b"back"], time)
    transport = retrying(inner, time)
    transport.call(Method.JOIN, b"", timeout_s=300.0)
    assert transport.call(Method.EXCHANGE, b"", timeout_s=300.0) == b"back"
    assert time.now_s > 30.0


def test_a_server_that_is_not_ready_yet_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    time = VirtualTime()
    wait = NotReadyError("worker 'a' was asked to give the model; it has not yet")
    transport = retrying(Scripted([wait, wait, b""], time), time)
    with caplog.at_level(logging.INFO, logger="dgs.transport"):
        transport.call(Method.JOIN, b"", timeout_s=60.0)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"server ps:7070: {wait}; trying again"),
        ("INFO", f"server ps:7070 was ready after {time.now_s:.1f} s"),
    ]


def test_a_server_that_is_not_ready_for_ten_seconds_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    time = VirtualTime()
    wait = NotReadyError("no model yet")
    transport = retrying(Scripted([*repeat(wait, 18), b""], time), time)
    with caplog.at_level(logging.WARNING, logger="dgs.transport"):
        transport.call(Method.JOIN, b"", timeout_s=60.0)
    told, end = (record.getMessage() for record in caplog.records)
    assert time.now_s > 20.0
    assert told.startswith("server ps:7070 is not ready after 1")
    assert told.endswith("s: no model yet; still waiting")
    assert end == f"server ps:7070 was ready after {time.now_s:.1f} s"


def test_a_server_that_was_never_ready_is_told_of_with_the_cause_that_callers_test() -> None:
    time = VirtualTime()
    inner = Scripted(repeat(NotReadyError("no model yet")), time)
    with pytest.raises(
        ServerUnavailableError, match="gave up waiting for server ps:7070"
    ) as caught:
        retrying(inner, time).call(Method.JOIN, b"", timeout_s=30.0)
    assert isinstance(caught.value.__cause__, NotReadyError)


def test_closing_ends_a_wait_and_the_inner_transport() -> None:
    time = VirtualTime()
    inner = Scripted(repeat(down()), time)
    transport = RetryingTransport(
        inner, RetryConfig(first_wait_s=600.0, longest_wait_s=600.0), random=Random(0)
    )
    caught: list[BaseException] = []

    def call() -> None:
        try:
            transport.call(Method.EXCHANGE, b"", timeout_s=3600.0)
        except ServerUnavailableError as error:
            caught.append(error)

    thread = Thread(target=call)
    thread.start()
    transport.close()
    thread.join(10.0)
    assert not thread.is_alive()
    assert inner.closed
    assert "closed" in str(caught[0])
