"""An interrupted and resumed run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import dgs
from dgs.errors import ConfigError, ServerUnavailableError
from dgs.transport.base import Method
from dgs.transport.local import LocalTransport
from tests.helpers.sites import model_of
from tests.helpers.training import (
    Batches,
    MakeOptimizer,
    flat,
    make_model,
    sgd,
    train_step,
    wrap,
)

INNER: dict[str, MakeOptimizer] = {
    "SGD": sgd,
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"selection": "tracked", "dense_below": 8},
    {"rule": "dgc", "values": "int8"},
    {"rule": "none", "density": 1.0, "download_density": 1.0},
    {"view": "compensated", "values": "sign"},
    {"local_steps": 3},
    {"overlap": True},
    {"overlap": True, "view": "compensated", "local_steps": 2, "values": "bfloat16"},
]


class Run:
    """Two workers on one server; the first may be interrupted."""

    def __init__(self, settings: dict[str, Any], inner: str, dtype: torch.dtype) -> None:
        self.shards = [dgs.ParameterServer(run=1), dgs.ParameterServer(run=1)]
        self.settings, self.inner, self.dtype = settings, INNER[inner], dtype
        self.models = [self.model(), self.model()]
        self.opts = [self.optimizer(i) for i in range(2)]
        self.batches = [Batches(0), Batches(1)]

    def model(self, seed: int = 1) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 3)]
        return nn.Sequential(*layers).to(self.dtype)

    def optimizer(self, i: int) -> dgs.DistributedOptimizer:
        settings = {"momentum": 0.4, "worker": f"w{i}", **self.settings}
        return wrap(self.models[i], self.shards, self.inner, **settings)

    def steps(self, first: int, second: int) -> None:
        for i, count in enumerate((first, second)):
            for _ in range(count):
                train_step(self.models[i], self.opts[i], self.batches[i])
                outgoing = self.opts[i]._exchanger._outgoing
                if outgoing is not None:  # what is in flight lands before the other worker's turn
                    outgoing.wait()

    def interrupt_first(self) -> None:
        """Throw the first worker away and rebuild it from its saved state."""
        saved = io.BytesIO()
        torch.save(self.opts[0].state_dict(), saved)
        self.opts[0].close(leave=False)
        self.models[0] = self.model(seed=99)
        self.opts[0] = self.optimizer(0)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)  # noqa: TID251 - that it suffices is tested
        self.opts[0].load_state_dict(state)

    def close(self) -> None:
        for opt in self.opts:
            opt.close()


@pytest.mark.filterwarnings("ignore:AdamW has momentum")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    settings: dict[str, Any], inner: str, dtype: torch.dtype
) -> None:
    calm, stormy = (Run(settings, inner, dtype) for _ in range(2))
    for interrupted, run in enumerate((calm, stormy)):
        for first, second in [(4, 3), (1, 4), (5, 0)]:
            run.steps(first, second)
            if interrupted:
                run.interrupt_first()
        run.steps(4, 2)
    assert stormy.opts[0].stats.rejoins == 0
    assert torch.equal(flat(stormy.models[0]), flat(calm.models[0]))
    assert torch.equal(flat(stormy.models[1]), flat(calm.models[1]))
    mean, expected = (r.models[0][1].running_mean for r in (stormy, calm))
    assert torch.equal(mean, expected)
    for a, b in zip(calm.shards, stormy.shards, strict=True):
        assert model_of(a).tobytes() == model_of(b).tobytes()
        assert a.version == b.version
    assert stormy.opts[0].stats.steps == calm.opts[0].stats.steps
    ours, theirs = (r.opts[0]._exchanger._worker.state() for r in (calm, stormy))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if k.startswith(("rule", "base")))
    for run in (calm, stormy):
        run.close()


def test_a_worker_without_a_name_takes_its_saved_one() -> None:
    server = dgs.ParameterServer()
    model = make_model()
    opt = wrap(model, server)
    data = Batches()
    train_step(model, opt, data)
    state = opt.state_dict()
    opt.close(leave=False)
    again = wrap(make_model(2), server)
    again.load_state_dict(state)
    assert again.stats.rejoins == 0
    assert [s.worker for s in server.state.registry.sessions()] == [state["dgs"]["worker"]]
    again.close()


class Flaky(LocalTransport):
    """A server's transport that can be cut, before or after the request arrives."""

    def __init__(self, server: dgs.ParameterServer) -> None:
        super().__init__(server)
        self.lose: str | None = None

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        if self.lose == "request":
            raise ServerUnavailableError("cut")
        reply = super().call(method, request, timeout_s=timeout_s)
        if self.lose == "reply":
            raise ServerUnavailableError("cut")
        return reply


@pytest.mark.parametrize("lost", ["request", "reply"])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_exchange_that_failed_is_finished_by_the_next_step(lost: str, overlap: bool) -> None:
    server = dgs.ParameterServer(dgs.ServerConfig(hash_interval=1))
    flaky = Flaky(server)
    model, data = make_model(), Batches()
    opt = wrap(model, flaky, overlap=overlap)
    for _ in range(4):
        train_step(model, opt, data)
    flaky.lose = lost
    for _ in range(2):
        # overlapped, the first failing step only starts the exchange that the second waits for
        try:
            train_step(model, opt, data)
        except ServerUnavailableError:
            failed = True
    assert failed
    flaky.lose = None
    for _ in range(4):
        train_step(model, opt, data)
    opt.state_dict()
    assert opt.stats.resyncs == 0
    assert server.version == opt.stats.exchanges
    opt.close()


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_a_state_saved_with_an_update_in_flight_resumes_and_applies_it_once(lost: str) -> None:
    server = dgs.ParameterServer(dgs.ServerConfig(hash_interval=1))
    flaky = Flaky(server)
    model, data = make_model(), Batches()
    opt = wrap(model, flaky, worker="w")
    train_step(model, opt, data)
    flaky.lose = lost
    with pytest.raises(ServerUnavailableError):
        train_step(model, opt, data)
    state = opt.state_dict()
    assert state["dgs"]["worker_state"]["in_flight"] == 1
    opt.close(leave=False)
    again = wrap(make_model(3), server, worker="w")
    again.load_state_dict(state)
    assert again.stats.rejoins == 0
    train_step(model, again, data)
    assert server.version == 3
    assert again.stats.resyncs == 0
    again.close()


def test_states_of_something_else_are_refused_and_change_nothing() -> None:
    model = make_model()
    opt = wrap(model, dgs.ParameterServer())
    before = flat(model)
    with pytest.raises(ConfigError, match="not the state of a dgs"):
        opt.load_state_dict(opt.inner.state_dict())
    other = wrap(make_model(), dgs.ParameterServer(), rule="dgc")
    with pytest.raises(ConfigError, match="use the rule that the state was saved with"):
        opt.load_state_dict(other.state_dict())
    small = nn.Linear(2, 2)
    tiny = wrap(small, dgs.ParameterServer())
    with pytest.raises(ConfigError, match="6 coordinates, this one has 387"):
        opt.load_state_dict(tiny.state_dict())
    late = wrap(make_model(), dgs.ParameterServer(), overlap=True)
    with pytest.raises(ConfigError, match="another setting of overlap"):
        opt.load_state_dict(late.state_dict())
    assert torch.equal(flat(model), before)
    for o in (opt, other, tiny, late):
        o.close()


def test_a_saved_state_can_be_resumed_again_until_its_session_goes_on() -> None:
    server, model, data = dgs.ParameterServer(), make_model(), Batches()
    opt = wrap(model, server, worker="w")
    train_step(model, opt, data)
    state = opt.state_dict()
    for _ in range(3):  # a process that dies each time before its first exchange
        opt.close(leave=False)
        opt = wrap(make_model(5), server, worker="w")
        opt.load_state_dict(state)
        assert opt.stats.rejoins == 0
    train_step(model, opt, data)
    opt.close(leave=False)
    opt = wrap(make_model(5), server, worker="w")
    opt.load_state_dict(state)
    assert opt.stats.rejoins == 1
    opt.close()


@pytest.mark.filterwarnings("ignore:AdamW has momentum")
def test_a_state_is_of_one_moment() -> None:
    model, data = make_model(), Batches()
    opt = wrap(model, dgs.ParameterServer(), INNER["AdamW"])
    train_step(model, opt, data)
    state = opt.state_dict()
    average = state["state"][0]["exp_avg"].clone()
    train_step(model, opt, data)
    assert torch.equal(state["state"][0]["exp_avg"], average)
    opt.close()
