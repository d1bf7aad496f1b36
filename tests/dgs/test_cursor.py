"""A worker's place in its data travels with its updates: kept if, and only if, they are applied."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import dgs
from dgs._proto import parameter_server_pb2 as pb
from dgs.errors import ConfigError, NonFiniteError, ServerUnavailableError
from dgs.transport.base import Method
from dgs.transport.local import LocalTransport
from tests.helpers.sites import overwrite
from tests.helpers.training import Batches, make_model, train_step, wrap


def new_worker(servers: Any, **settings: Any) -> tuple[Any, dgs.DistributedOptimizer]:
    model = make_model(3)
    return model, wrap(model, servers, worker="w", **settings)


def train(model: Any, opt: dgs.DistributedOptimizer, cursors: list[str]) -> None:
    data = Batches()
    for cursor in cursors:
        opt.cursor = cursor.encode()
        train_step(model, opt, data)


class Cut(LocalTransport):
    """A server's transport that can lose an exchange's request or its reply."""

    def __init__(self, server: dgs.ParameterServer) -> None:
        super().__init__(server)
        self.lose = ""

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        if method == Method.EXCHANGE and self.lose == "request":
            raise ServerUnavailableError("cut")
        reply = super().call(method, request, timeout_s=timeout_s)
        if method == Method.EXCHANGE and self.lose == "reply":
            raise ServerUnavailableError("cut")
        return reply


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_new_process_is_told_the_cursor_of_the_last_applied_update(num_shards: int) -> None:
    servers = [dgs.ParameterServer() for _ in range(num_shards)]
    model, opt = new_worker(servers)
    assert opt.cursor == b""
    train(model, opt, ["1", "2", "3"])
    opt.cursor = b"set, but never sent"
    opt.close(leave=False)
    model, again = new_worker(servers)
    assert again.cursor == b"3"
    assert again.stats.replaced == 3
    train(model, again, ["4"])
    again.close()
    _, last = new_worker(servers)  # also after leaving
    assert (last.cursor, last.stats.replaced) == (b"4", 4)
    last.close()
    other = wrap(make_model(), servers, worker="other")
    assert (other.cursor, other.stats.replaced) == (b"", 0)
    other.close()


def test_several_local_steps_and_overlap_keep_what_is_set_when_the_round_ends() -> None:
    server = dgs.ParameterServer()
    model, opt = new_worker(server, local_steps=3)
    train(model, opt, [str(i) for i in range(1, 6)])
    assert cursor_at(server) == b"3"
    opt.close(leave=False)
    server = dgs.ParameterServer()
    model, opt = new_worker(server, overlap=True)
    train(model, opt, ["1", "2", "3"])
    opt.close(leave=False)  # lands the last one
    assert cursor_at(server) == b"3"


def cursor_at(server: dgs.ParameterServer) -> bytes:
    [session] = server.state.registry.sessions()
    return session.cursor


@pytest.mark.parametrize(("lose", "kept"), [("request", b"1"), ("reply", b"2")])
def test_a_cursor_is_kept_if_and_only_if_its_update_was_applied(lose: str, kept: bytes) -> None:
    server = dgs.ParameterServer()
    cut = Cut(server)
    model, opt = new_worker(cut)
    train(model, opt, ["1"])
    cut.lose = lose
    with pytest.raises(ServerUnavailableError):
        train(model, opt, ["2"])
    opt.close(leave=False)
    _, again = new_worker(server)
    assert again.cursor == kept
    again.close()


def test_an_exchange_that_is_finished_late_keeps_its_own_cursor_and_the_next_one_the_next() -> None:
    server = dgs.ParameterServer()
    cut = Cut(server)
    model, opt = new_worker(cut)
    cut.lose = "request"
    with pytest.raises(ServerUnavailableError):
        train(model, opt, ["1"])
    cut.lose = ""
    opt.cursor = b"2"
    opt.state_dict()
    opt._exchanger.begin_step()
    assert cursor_at(server) == b"1"
    train(model, opt, ["2"])
    assert cursor_at(server) == b"2"
    opt.close()


def test_what_was_set_for_a_step_survives_that_the_one_before_it_was_lost() -> None:
    server = dgs.ParameterServer()
    cut = Cut(server)
    model, opt = new_worker(cut)
    train(model, opt, ["1"])
    cut.lose = "request"
    with pytest.raises(ServerUnavailableError):
        train(model, opt, ["2"])
    cut.lose = ""
    evict(server, opt)
    train(model, opt, ["3"])
    assert (cursor_at(server), opt.cursor, opt.stats.rejoins) == (b"3", b"3", 1)
    opt.close()


def test_of_several_servers_the_furthest_one_counts() -> None:
    servers = [dgs.ParameterServer(), dgs.ParameterServer()]
    links = [LocalTransport(servers[0]), Cut(servers[1])]
    model, opt = new_worker(links)
    train(model, opt, ["1"])
    links[1].lose = "request"  # type: ignore[attr-defined]
    with pytest.raises(ServerUnavailableError):
        train(model, opt, ["2"])
    opt.close(leave=False)
    _, again = new_worker(servers)
    assert (again.cursor, again.stats.replaced) == (b"2", 2)
    again.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_had_to_join_again_tells_the_cursor_that_was_applied_last(
    overlap: bool,
) -> None:
    server = dgs.ParameterServer()
    model, opt = new_worker(server, overlap=overlap)
    train(model, opt, ["1", "2"])
    opt.state_dict()  # lands what is in flight
    evict(server, opt)
    train(model, opt, ["3"])
    if overlap:  # it is in flight, and lands in the next step
        assert opt.cursor == b"3"
        train(model, opt, ["4"])
    assert (opt.cursor, opt.stats.rejoins) == (b"2", 1)
    train(model, opt, ["5"])
    opt.state_dict()
    assert cursor_at(server) == b"5"
    opt.close()


def test_an_update_that_was_refused_moves_the_cursor_on() -> None:
    server = dgs.ParameterServer()
    model = torch.nn.Linear(4, 4, bias=False)
    opt = wrap(model, server, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), density=1.0)
    overwrite(server, -3e38)
    model.weight.grad = torch.full((4, 4), 3e38)
    opt.cursor = b"bad batch"
    with pytest.raises(NonFiniteError, match="overflows the model"):
        opt.step()
    assert cursor_at(server) == opt.cursor == b"bad batch"
    opt.close()


def evict(server: dgs.ParameterServer, opt: dgs.DistributedOptimizer) -> None:
    """Close a worker's session, as a server does after a long silence."""
    [ticket] = opt._exchanger._worker.dialog.tickets
    leave = pb.LeaveRequest(
        run=ticket.run, worker_id=ticket.worker_id, incarnation=ticket.incarnation
    )
    server.handle("Leave", leave.SerializeToString())


def test_a_saved_state_that_goes_on_has_its_own_cursor_and_otherwise_the_servers_counts() -> None:
    server = dgs.ParameterServer()
    model, opt = new_worker(server, local_steps=2)
    train(model, opt, ["1", "2", "3"])
    state = opt.state_dict()
    opt.close(leave=False)
    model, again = new_worker(server, local_steps=2)
    assert again.cursor == b"2"
    again.load_state_dict(state)
    assert (again.cursor, again.stats.replaced) == (b"3", 0)  # the half round is there as well
    train(model, again, ["4", "5", "6"])
    again.close(leave=False)
    _, late = new_worker(server, local_steps=2)
    late.load_state_dict(state)
    assert (late.cursor, late.stats.rejoins) == (b"6", 1)
    late.close()
    _, elsewhere = new_worker(dgs.ParameterServer(), local_steps=2)
    elsewhere.load_state_dict(state)  # a server that knows nothing takes the saved model
    assert elsewhere.cursor == b"3"
    elsewhere.close()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3", r"the cursor is a str; give bytes, such as str\(step\)\.encode\(\)"),
        (3, "the cursor is a int"),
        (bytearray(b"3"), "the cursor is a bytearray"),
        (bytes(4097), "the cursor has 4097 bytes, and may have 4096"),
    ],
)
def test_other_cursors_are_refused_when_they_are_set(value: Any, message: str) -> None:
    server = dgs.ParameterServer()
    model, opt = new_worker(server)
    train(model, opt, ["1"])
    with pytest.raises(ConfigError, match=message):
        opt.cursor = value
    assert opt.cursor == b"1"
    train(model, opt, ["x" * 4096])
    assert len(cursor_at(server)) == 4096
    opt.close()


def test_what_is_lost_with_an_earlier_process_is_said_once_when_training_begins(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = dgs.ParameterServer()
    model, opt = new_worker(server)
    train(model, opt, ["1", "2"])
    state = opt.state_dict()
    opt.close(leave=False)
    assert not caplog.records
    with caplog.at_level(logging.INFO, logger="dgs.optimizer"):
        _, again = new_worker(server)
        again.load_state_dict(state)
        train(model, again, ["3"])
        assert not caplog.records  # nothing was lost
        again.close(leave=False)
        model, third = new_worker(server)
        train(model, third, ["4", "5"])
    [record] = caplog.records
    assert record.getMessage().startswith(
        "worker w takes the place of its earlier process, of which the servers have applied 3 "
        "update(s); these stay. What is lost is at most that process's velocity"
    )
    third.close()
