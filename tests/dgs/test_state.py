"""A saved state is the state: whatever comes next is answered as if nothing had happened."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dgs.config import ServerConfig, WorkerConfig
from dgs.errors import SequenceError
from dgs.server import ParameterServer
from dgs.state import SavedState, ServerState, fingerprint
from tests.helpers.requests import Said, answer, halves, is_same, record
from tests.helpers.sites import SHAPES, Site, model_of, space_of

SIZE = space_of(SHAPES).size
SETTINGS: list[dict[str, Any]] = [
    {},
    {"selection": "exact"},
    {"download_density": 1.0},
    {"download_density": 1.0, "values": "int8"},
    {"values": "int4", "density": 1.0},
    {"values": "sign", "selection": "exact"},
]


def fresh_server() -> ParameterServer:
    return ParameterServer(ServerConfig(hash_interval=4), run=9)


def carry_out(server: ParameterServer, said: list[Said]) -> None:
    for one in said:
        assert is_same(answer(server, one), one.reply)


def rebuilt(saved: SavedState) -> ParameterServer:
    """Rebuild a server from what a file could hold."""
    facts = json.loads(json.dumps(saved.facts))
    arrays = {
        part: {name: a.copy() for name, a in compute().items()}
        for part, compute in saved.arrays.items()
    }
    return ParameterServer.of(ServerState.restored(facts, arrays))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_restored_server_answers_everything_as_the_saved_one_does(
    settings: dict[str, Any],
) -> None:
    said = record(**settings)
    assert sum(one.method == "Exchange" for one in said) > 40
    for before, after in halves(said, step=17):
        server = fresh_server()
        carry_out(server, before)
        restored = rebuilt(server.state.save())
        assert fingerprint(restored.state) == fingerprint(server.state)
        carry_out(restored, after)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_saved_state_stays_what_it_was_while_the_server_goes_on(
    settings: dict[str, Any],
) -> None:
    for before, after in halves(record(**settings), step=23):
        server = fresh_server()
        carry_out(server, before)
        saved, then = server.state.save(), fingerprint(server.state)
        carry_out(server, after)
        assert fingerprint(rebuilt(saved).state) == then


def test_saving_changes_nothing() -> None:
    quiet, saved_often = fresh_server(), fresh_server()
    for one in record():
        answer(quiet, one)
        saved_often.state.save()
        answer(saved_often, one)
    assert fingerprint(quiet.state) == fingerprint(saved_often.state)


def test_only_requests_that_changed_the_state_are_counted_and_they_alone_give_it() -> None:
    server, changing = fresh_server(), []
    for one in record():
        before = server.state.changes
        answer(server, one)
        assert server.state.changes - before in (0, 1)
        if server.state.changes > before:
            changing.append(one)
    again = fresh_server()
    for one in changing:
        answer(again, one)
    assert fingerprint(again.state) == fingerprint(server.state)
    assert len(changing) < len(record())


def test_fingerprints_tell_states_apart() -> None:
    said = record(rounds=12)
    server, seen = fresh_server(), set[str]()
    for one in said:
        before = server.state.changes
        answer(server, one)
        if server.state.changes > before:
            seen.add(fingerprint(server.state))
    assert len(seen) == server.state.changes


def test_refusals_are_no_part_of_the_fingerprint() -> None:
    server = fresh_server()
    before = fingerprint(server.state)
    answer(server, Said("Exchange", b"nothing", b""))
    assert server.state.totals.refused == 1
    assert fingerprint(server.state) == before


def test_kept_replies_stay_within_their_limit_and_the_oldest_give_way() -> None:
    said = [one for one in record(rounds=30) if one.method != "PullModel"]
    lengths = [len(one.reply) for one in said if one.method == "Exchange" and one.reply]  # type: ignore[arg-type]
    most = int(2.5 * max(lengths))
    config = ServerConfig(hash_interval=4, max_reply_bytes=most)
    server, restored = ParameterServer(config, run=9), ParameterServer(config, run=9)
    for turn, one in enumerate(said):
        reply = answer(server, one)
        assert is_same(answer(restored, one), reply)
        kept = [len(s.reply) for s in server.state.registry.all_sessions()]
        assert sum(kept) <= most
        if turn % 5 == 0:
            restored = rebuilt(restored.state.save())
    assert any(not s.reply for s in server.state.registry.all_sessions())


def test_a_repeated_request_whose_reply_gave_way_asks_to_join_again() -> None:
    servers = [ParameterServer(ServerConfig(max_reply_bytes=0), run=9)]
    start = np.zeros(SIZE, np.float32)
    sites = [Site(n, servers, WorkerConfig(), start) for n in "ab"]
    frames = sites[0].collect(np.ones(SIZE, np.float32))
    first = sites[0].client.exchange(frames)
    assert sites[0].client.exchange(frames) == first  # the latest stays
    sites[1].exchange(np.ones(SIZE, np.float32))
    version = servers[0].version
    with pytest.raises(SequenceError, match="join again"):
        sites[0].client.exchange(frames)
    assert servers[0].version == version


def test_a_session_that_was_behind_and_equal_is_restored_with_what_it_has() -> None:
    config = WorkerConfig(rule="none", density=1.0, download_density=1.0)
    server = fresh_server()
    start = np.zeros(SIZE, np.float32)
    a, b = (Site(n, [server], config, start) for n in "ab")

    def step(site: Site, value: float) -> None:
        progress = np.zeros(SIZE, np.float32)
        progress[3] = value
        site.exchange(progress)

    for _ in range(2):
        step(a, 0.0)  # the model stays what it is; b was answered before
    server.state = rebuilt(server.state.save()).state
    assert fingerprint(server.state)
    step(a, 1.0)
    step(a, -2.0)
    step(b, 2.0)
    assert b.base.tobytes() == model_of(server).tobytes()
