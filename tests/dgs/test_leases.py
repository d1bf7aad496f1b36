from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgs.errors import ConfigError
from dgs.leases import Leases

A, B = (1, 0, 7), (2, 1, 9)


def test_an_unchanged_session_expires_exactly_when_its_lease_is_over() -> None:
    leases = Leases(10.0)
    assert leases.observe(100.0, [(A, 5)]) == []
    assert leases.observe(109.999, [(A, 5)]) == []
    assert leases.observe(110.0, [(A, 5)]) == [A]


def test_a_change_begins_a_new_lease() -> None:
    leases = Leases(10.0)
    leases.observe(0.0, [(A, 0), (B, 0)])
    assert leases.observe(9.0, [(A, 1), (B, 0)]) == []
    assert leases.observe(18.0, [(A, 1), (B, 0)]) == [B]
    assert leases.observe(19.0, [(A, 1)]) == [A]


def test_a_session_that_has_left_is_forgotten() -> None:
    leases = Leases(10.0)
    leases.observe(0.0, [(A, 0)])
    leases.observe(5.0, [])
    assert leases.observe(12.0, [(A, 0)]) == []
    assert leases.observe(22.0, [(A, 0)]) == [A]


def test_an_expired_session_is_named_once_and_is_new_if_it_stays() -> None:
    leases = Leases(10.0)
    leases.observe(0.0, [(A, 0)])
    assert leases.observe(50.0, [(A, 0)]) == [A]
    assert leases.observe(51.0, [(A, 0)]) == []
    assert leases.observe(61.0, [(A, 0)]) == [A]


def test_a_new_incarnation_is_another_session() -> None:
    leases = Leases(10.0)
    leases.observe(0.0, [((1, 0, 7), 0)])
    assert leases.observe(9.0, [((1, 0, 8), 0)]) == []
    assert leases.observe(18.0, [((1, 0, 8), 0)]) == []


def test_a_first_look_after_a_pause_expires_nobody() -> None:
    assert Leases(10.0).observe(1e9, [(A, 0), (B, 3)]) == []


def test_without_a_lease_nothing_ever_expires() -> None:
    leases = Leases(0.0)
    leases.observe(0.0, [(A, 0)])
    assert leases.observe(1e12, [(A, 0)]) == []


@pytest.mark.parametrize("lease_s", [-1.0, float("nan")])
def test_a_lease_that_is_no_span_of_time_is_refused(lease_s: float) -> None:
    with pytest.raises(ConfigError, match="lease_s"):
        Leases(lease_s)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), max_size=40))
def test_only_sessions_that_were_silent_for_the_whole_lease_expire(
    looks: list[tuple[int, bool, bool]],
) -> None:
    leases = Leases(6.0)
    now_s, mark, since_s = 0.0, 0, None
    for pause_s, moves, there in looks:
        now_s += pause_s
        mark += moves
        since_s = (now_s if since_s is None or moves else since_s) if there else None
        expired = leases.observe(now_s, [(A, mark)] if there else [])
        assert bool(expired) == (since_s is not None and now_s - since_s >= 6.0)
        if expired:
            since_s = None
