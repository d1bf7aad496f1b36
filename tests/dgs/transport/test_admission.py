from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgs.errors import ConfigError, ServerUnavailableError
from dgs.transport.admission import Arrival, InFlight

TIMEOUT_S = 20.0


def test_a_request_that_finds_no_room_is_put_off_and_counted() -> None:
    in_flight = InFlight(10)
    with in_flight.request() as first, in_flight.request() as second:
        first.add(6)
        second.add(4)
        with pytest.raises(ServerUnavailableError, match=r"the server is busy: 10 bytes .* of 10"):
            second.add(1)
        assert (in_flight.held_bytes, in_flight.put_off) == (10, 1)
    assert in_flight.held_bytes == 0


def test_a_request_larger_than_the_limit_is_served_alone() -> None:
    in_flight = InFlight(10)
    with in_flight.request() as large, in_flight.request() as other:
        for _ in range(5):
            large.add(8)
        with pytest.raises(ServerUnavailableError, match="busy"):
            other.add(1)
        assert in_flight.held_bytes == 40
    with in_flight.request() as other:
        other.add(1)


def test_a_whole_request_counts_until_it_is_answered() -> None:
    in_flight = InFlight(10, patience_s=0.0)
    with in_flight.request() as waiting:
        waiting.add(10)
        waiting.complete()
        with pytest.raises(ServerUnavailableError), in_flight.request() as other:
            other.add(1)
        assert in_flight.held_bytes == 10
    assert in_flight.held_bytes == 0


def test_the_oldest_arriving_request_gets_the_next_room_and_the_others_are_put_off() -> None:
    in_flight = InFlight(10, patience_s=TIMEOUT_S)
    with ThreadPoolExecutor(1) as pool, ExitStack() as small, in_flight.request() as large:
        large.add(5)
        waiting = small.enter_context(in_flight.request())
        waiting.add(5)
        waiting.complete()
        pending = pool.submit(large.add, 5)
        put_off = 0
        while not put_off:  # until the large one has claimed the next room
            with in_flight.request() as other:
                try:
                    other.add(0)
                except ServerUnavailableError:
                    put_off += 1
        assert not pending.done()
        small.close()
        pending.result(TIMEOUT_S)
        assert in_flight.held_bytes == 10


def test_a_large_request_gets_through_a_stream_of_small_ones() -> None:
    in_flight = InFlight(10)
    stop = threading.Event()

    def keep_sending() -> None:
        while not stop.is_set():
            with suppress(ServerUnavailableError), in_flight.request() as small:
                small.add(2)
                small.complete()

    def sent() -> bool:
        with suppress(ServerUnavailableError), in_flight.request() as large:
            for _ in range(20):
                large.add(2)
            return in_flight.held_bytes == 40
        return False

    with ThreadPoolExecutor(3) as pool:
        sending = [pool.submit(keep_sending) for _ in range(3)]
        attempts = 0
        while not sent() and attempts < 1000:
            attempts += 1
            stop.wait(0.001)  # as a client does, and so that the others go on
        stop.set()
        for one in sending:
            one.result(TIMEOUT_S)
    assert attempts < 1000
    assert in_flight.held_bytes == 0


@given(
    st.integers(1, 20),
    st.lists(
        st.tuples(st.sampled_from(["add", "complete", "end"]), st.integers(0, 3), st.integers(0, 9))
    ),
)
def test_the_sum_is_exact_and_within_the_limit_unless_one_request_is_alone(
    limit_bytes: int, steps: list[tuple[str, int, int]]
) -> None:
    in_flight = InFlight(limit_bytes, patience_s=0.0)
    stacks: dict[int, ExitStack] = {}
    arrivals: dict[int, Arrival] = {}

    def end(who: int) -> None:
        del arrivals[who]
        stacks.pop(who).close()

    for step, who, count in steps:
        if who not in arrivals:
            stacks[who] = ExitStack()
            arrivals[who] = stacks[who].enter_context(in_flight.request())
        if step == "add":
            try:
                arrivals[who].add(count)
            except ServerUnavailableError:
                end(who)
        elif step == "complete":
            arrivals[who].complete()
        else:
            end(who)
        held = [a.held_bytes for a in arrivals.values() if a.held_bytes]
        assert in_flight.held_bytes == sum(held)
        assert sum(held) <= limit_bytes or len(held) == 1
    for who in list(arrivals):
        end(who)
    assert in_flight.held_bytes == 0


def test_a_limit_that_admits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_in_flight_bytes=0"):
        InFlight(0)
