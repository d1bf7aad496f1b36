"""What a worker keeps when its session cannot go on: nothing is applied twice, losses are said."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dgs
from dgs.config import RetryConfig, ServerConfig
from dgs.errors import (
    NonFiniteError,
    NotReadyError,
    ServerUnavailableError,
    UnknownWorkerError,
)
from dgs.transport.base import Method
from dgs.transport.connect import Servers
from dgs.transport.local import LocalTransport
from tests.helpers.sites import make_servers, model_of, overwrite, sessions
from tests.helpers.training import Batches, flat, make_model, train_step, wrap

STEPS = 5


def make_normed(seed: int = 1) -> nn.Module:
    """Build a network with averaged buffers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def new_servers(count: int) -> list[dgs.ParameterServer]:
    return [dgs.ParameterServer(ServerConfig(hash_interval=1)) for _ in range(count)]


def trained(
    servers: list[dgs.ParameterServer], names: list[str]
) -> tuple[list[nn.Module], list[dict[str, Any]]]:
    """Train with several workers in turn and return their models and saved states."""
    models = [make_normed() for _ in names]
    opts = [wrap(m, servers, worker=n) for m, n in zip(models, names, strict=True)]
    batches = [Batches(i) for i in range(len(names))]
    for _ in range(STEPS):
        for model, opt, data in zip(models, opts, batches, strict=True):
            train_step(model, opt, data)
    states = [opt.state_dict() for opt in opts]
    for opt in opts:
        opt.close(leave=False)
    return models, states


def velocity(opt: dgs.DistributedOptimizer) -> torch.Tensor:
    return opt._exchanger._worker.state()["rule.velocity"]


def saved(state: dict[str, Any], name: str) -> torch.Tensor:
    return state["dgs"]["worker_state"][name]


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_resuming_on_new_servers_goes_on_from_the_saved_model_not_from_a_random_one(
    num_shards: int, order: tuple[int, int]
) -> None:
    names = ["a", "b"]
    _, states = trained(new_servers(num_shards), names)
    servers = new_servers(num_shards)
    models = [make_normed(seed=99) for _ in names]
    opts = [wrap(m, servers, worker=n) for m, n in zip(models, names, strict=True)]
    for i in order:
        opts[i].load_state_dict(states[i])
    first = states[order[0]]
    expected = torch.cat([saved(first, "base"), saved(first, "averaged")])
    pulled = opts[0].pull_model()
    assert torch.equal(torch.cat([pulled[n].flatten() for n in opts_names(opts[0])]), expected)
    assert all(torch.equal(flat(m), saved(first, "base")) for m in models)
    for opt, state in zip(opts, states, strict=True):
        assert torch.equal(velocity(opt), saved(state, "rule.velocity"))  # nobody has it yet
        assert opt.stats.rejoins == 1
    for i in (0, 1, 0):
        train_step(models[i], opts[i], Batches(i))
    assert [opt.stats.resyncs for opt in opts] == [0, 0]
    for opt in opts:
        opt.close()


def opts_names(opt: dgs.DistributedOptimizer) -> list[str]:
    return [t.name for t in opt._exchanger._binding.space.tensors]


def test_a_worker_that_joined_a_server_before_it_was_restored_joins_again_by_itself() -> None:
    _, states = trained(new_servers(1), ["a"])
    servers = new_servers(1)
    early_model, model = make_normed(2), make_normed(3)
    early = wrap(early_model, servers, worker="early")
    opt = wrap(model, servers, worker="a")
    opt.load_state_dict(states[0])
    train_step(early_model, early, Batches(1))
    assert early.stats.rejoins == 1
    assert torch.equal(flat(early_model), saved(states[0], "base"))
    train_step(early_model, early, Batches(1))
    assert early.stats.rejoins == 1
    for o in (early, opt):
        o.close()


def test_a_saved_model_replaces_nothing_that_was_trained_or_chosen() -> None:
    _, states = trained(new_servers(1), ["a"])
    on = new_servers(1)
    other_model = make_normed(4)
    other = wrap(other_model, on, worker="other")
    train_step(other_model, other, Batches(1))
    chosen = {n: t.detach().numpy() for n, t in make_normed(5).state_dict().items()}
    del chosen["1.num_batches_tracked"]
    given = dgs.ParameterServer(init=chosen)
    for server in (on[0], given):
        model = make_normed(6)
        opt = wrap(model, server, worker="a")
        before = flat(model)
        opt.load_state_dict(states[0])
        assert torch.equal(flat(model), before)
        assert opt.stats.rejoins == 1
        opt.close()
    other.close()


def test_a_velocity_of_which_the_server_has_applied_some_since_is_dropped_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, model, data = dgs.ParameterServer(), make_model(), Batches()
    opt = wrap(model, server, worker="w")
    for _ in range(3):
        train_step(model, opt, data)
    state = opt.state_dict()
    train_step(model, opt, data)  # answered after the state was saved
    opt.close(leave=False)
    again = wrap(model, server, worker="w")
    with caplog.at_level(logging.WARNING):
        again.load_state_dict(state)
    assert "of 1 server(s), 0 are new and 1 have answered it since" in caplog.text
    assert again.stats.rejoins == 1
    assert not velocity(again).any()
    pulled = again.pull_model()
    assert all(torch.equal(p, pulled[n]) for n, p in model.named_parameters())
    train_step(model, again, data)
    again.close()


@pytest.mark.parametrize("since", [0, 1])
def test_a_state_saved_before_leaving_keeps_its_velocity_if_nothing_came_after_it(
    since: int,
) -> None:
    server, model, data = dgs.ParameterServer(), make_model(), Batches()
    opt = wrap(model, server, worker="w")
    for _ in range(3):
        train_step(model, opt, data)
    state = opt.state_dict()
    for _ in range(since):
        train_step(model, opt, data)
    opt.close()
    again = wrap(model, server, worker="w")
    again.load_state_dict(state)
    assert again.stats.rejoins == 1
    expected = saved(state, "rule.velocity")
    assert torch.equal(velocity(again), expected if since == 0 else torch.zeros_like(expected))
    again.close()


def test_another_workers_state_gives_the_optimizers_state_but_neither_velocity_nor_session(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def momentum(m: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)

    server, model, data = dgs.ParameterServer(), make_model(), Batches()
    opt = wrap(model, server, momentum, worker="a", local_steps=2)
    for _ in range(2):
        train_step(model, opt, data)
    other_model = make_model(2)
    other = wrap(other_model, server, momentum, worker="b", local_steps=2)
    before = flat(other_model)
    other.load_state_dict(opt.state_dict())
    assert "worker b was given the state of worker a" in caplog.text
    buffers = [s["momentum_buffer"] for s in other.state.values()]
    assert any(b.any() for b in buffers)
    assert not velocity(other).any()
    assert torch.equal(flat(other_model), before)
    for _ in range(2):  # both sessions are alive
        train_step(model, opt, data)
        train_step(other_model, other, data)
    for o in (opt, other):
        o.close()


def test_a_dropped_session_is_joined_again_counted_and_keeps_what_was_not_sent() -> None:
    server, model, data = (
        dgs.ParameterServer(ServerConfig(hash_interval=1)),
        make_model(),
        Batches(),
    )
    opt = wrap(model, server, worker="w")
    for _ in range(3):
        train_step(model, opt, data)
    server.state.registry.forget(0, 0)
    train_step(model, opt, data)
    assert opt.stats.rejoins == 1
    assert velocity(opt).any()
    assert torch.equal(flat(model), torch.from_numpy(np.array(model_of(server))))
    for _ in range(3):
        train_step(model, opt, data)
    assert (opt.stats.rejoins, opt.stats.resyncs) == (1, 0)
    opt.close()


@pytest.mark.parametrize(
    "changed",
    [
        {"download_density": 1.0},
        {"values": "int8"},
        {"selection": "tracked"},
        {"selection": "tracked", "dense_below": 10_000},
        {"density": 0.5},
        {"momentum": 0.0},
    ],
)
def test_settings_that_were_changed_apply_to_a_resumed_session(changed: dict[str, Any]) -> None:
    server, model, data = (
        dgs.ParameterServer(ServerConfig(hash_interval=1)),
        make_model(),
        Batches(),
    )
    opt = wrap(model, server, worker="w")
    for _ in range(3):
        train_step(model, opt, data)
    state = opt.state_dict()
    opt.close(leave=False)
    again = wrap(make_model(2), server, worker="w", **changed)
    again.load_state_dict(state)
    assert again.stats.rejoins == 0
    record = next(sessions(server)).record
    assert record._density == changed.get("download_density", 0.1)
    assert record.values == changed.get("values", "float32")
    assert record._selection == (changed.get("selection", "exact"), changed.get("dense_below", 32))
    for _ in range(3):
        train_step(model, again, data)
    assert again.stats.resyncs == 0
    again.close()


def test_a_join_that_arrives_after_its_worker_left_opens_nothing() -> None:
    requests: list[bytes] = []

    class Recording(LocalTransport):
        def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
            if method == Method.JOIN:
                requests.append(request)
            return super().call(method, request, timeout_s=timeout_s)

    server, model = dgs.ParameterServer(), make_model()
    opt = wrap(model, Recording(server), worker="w")
    opt.close()
    with pytest.raises(UnknownWorkerError, match="has left since this request was made"):
        server.handle("Join", requests[-1])
    assert list(sessions(server)) == []
    wrap(model, server, worker="w").close()


def test_workers_that_have_gone_silent_do_not_weigh_in_the_average_of_buffers() -> None:
    server = dgs.ParameterServer()
    opts = [wrap(make_normed(), server, worker=f"w{i}") for i in range(4)]
    model = make_normed()
    opt = wrap(model, server, worker="alive")
    assert server.state.registry.num_active(server.version) == 5
    data = Batches()
    for _ in range(41):
        train_step(model, opt, data)
    assert server.state.registry.num_active(server.version) == 1
    own = model[1].running_mean.clone()  # type: ignore[union-attr]
    train_step(model, opt, data)
    assert not torch.equal(model[1].running_mean, own)  # type: ignore[arg-type]
    assert torch.equal(opt.pull_model()["1.running_mean"], model[1].running_mean)  # type: ignore[arg-type]
    for o in (*opts, opt):
        o.close()


class Cut(LocalTransport):
    """One shard's transport; the next exchange after `cut` is set does not arrive."""

    def __init__(self, server: dgs.ParameterServer) -> None:
        super().__init__(server)
        self.cut = False

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        if self.cut and method == Method.EXCHANGE:
            self.cut = False
            raise ServerUnavailableError("cut")
        return super().call(method, request, timeout_s=timeout_s)


def test_a_shards_refusal_drops_nothing_of_what_another_shard_has_not_received() -> None:
    servers = [dgs.ParameterServer(ServerConfig(hash_interval=1)) for _ in range(2)]
    links = [Cut(s) for s in servers]
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    opt = wrap(
        model,
        links,
        lambda m: torch.optim.SGD(m.parameters(), lr=1.0),
        density=1.0,
        download_density=1.0,
        momentum=0.0,
    )

    def step(first: float, second: float) -> None:
        model[0].weight.grad = torch.full((4, 4), first)  # type: ignore[union-attr]
        model[1].weight.grad = torch.full((4, 4), second)  # type: ignore[union-attr]
        opt.step()

    step(1.0, 1.0)
    before = flat(model)[:16]
    overwrite(servers[1], -3e38)
    links[0].cut = True
    with pytest.raises(NonFiniteError, match=r"overflows the model in tensor '1\.weight'"):
        step(2.0, 3e38)
    assert torch.equal(flat(model)[:16], before - 2.0)
    assert opt.stats.refused == 1
    step(1.0, 0.0)
    assert [s.version for s in servers] == [opt.stats.exchanges] * 2
    assert opt.stats.resyncs == 0
    opt.close()


def test_the_last_shards_get_a_model_although_their_giver_is_gone() -> None:
    servers = make_servers(2)

    class Dying(LocalTransport):
        def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
            raise ServerUnavailableError("the giver died here")

    class Impatient(LocalTransport):
        def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
            try:
                return super().call(method, request, timeout_s=timeout_s)
            except NotReadyError as e:
                raise ServerUnavailableError("gave up") from e

    with pytest.raises(ServerUnavailableError, match="the giver died here"):
        wrap(make_model(), [LocalTransport(servers[0]), Dying(servers[1])], worker="first")
    model = make_model(2)
    opt = wrap(model, [Impatient(s) for s in servers], worker="second")
    assert all(s.ready for s in servers)
    train_step(model, opt, Batches())
    assert opt.stats.resyncs == 0
    opt.close()


def test_two_workers_in_one_process_may_start_at_once() -> None:
    server = dgs.ParameterServer()
    barrier = threading.Barrier(4)
    opts: list[dgs.DistributedOptimizer] = []

    def start(seed: int) -> None:
        model = make_model(seed)
        barrier.wait(timeout=30)
        opts.append(wrap(model, server, worker=f"w{seed}"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))
    models = [flat_of(opt) for opt in opts]
    assert all(torch.equal(m, models[0]) for m in models)
    for opt in opts:
        opt.close()


def flat_of(opt: dgs.DistributedOptimizer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for g in opt.param_groups for p in g["params"]])


def reopened(
    servers: Servers, state: dict[str, Any] | None, *, steps: int = 0
) -> tuple[dgs.DistributedOptimizer, dict[str, Any]]:
    """Start worker "w" anew, load its state, step; return it with the state that it had then."""
    model = make_model(7)
    opt = wrap(model, servers, worker="w", momentum=0.0)
    if state is not None:
        opt.load_state_dict(state)
    for i in range(steps):
        train_step(model, opt, Batches(i))
    return opt, opt.state_dict()


def test_velocity_is_dropped_for_those_shards_only_that_have_applied_some_of_it() -> None:
    old, replaced = dgs.ParameterServer(), dgs.ParameterServer()
    opt, state = reopened([old, replaced], None, steps=STEPS)
    model_step(opt)
    opt.close(leave=False)
    again, _ = reopened([old, dgs.ParameterServer()], state)
    border = again._exchanger._worker.parts[0].local.stop
    assert not velocity(again)[:border].any()
    expected = saved(state, "rule.velocity")[border:]
    assert expected.any()
    assert torch.equal(velocity(again)[border:], expected)
    again.close()


def model_step(opt: dgs.DistributedOptimizer) -> None:
    """Make one step with gradients of one."""
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


def test_a_replaced_shard_gets_its_part_of_the_saved_model_from_whoever_resumes_first() -> None:
    kept, lost = new_servers(2)
    _, states = trained([kept, lost], ["a", "b"])
    servers = [kept, *new_servers(1)]
    model = make_normed(seed=99)
    retry = RetryConfig(connect_budget_s=0.3)
    second = wrap(model, servers, worker="b", retry=retry)  # not the one that gave the first shard
    second.load_state_dict(states[1])
    border = second._exchanger._worker.parts[0].local.stop
    assert torch.equal(flat(model)[border:], saved(states[1], "base")[border:])
    second.close()


def test_a_session_dropped_after_it_exchanged_leaves_nothing_to_apply_twice() -> None:
    server = dgs.ParameterServer()
    opt, state = reopened(server, None, steps=STEPS)
    opt.close(leave=True)
    opt, _ = reopened(server, state)
    assert velocity(opt).any()  # nothing was applied since
    model_step(opt)
    server.state.registry.forget(0, 0)
    opt.close(leave=False)
    opt, _ = reopened(server, state)
    assert not velocity(opt).any()
    opt.close()


@pytest.mark.parametrize("leave", [(True, False), (False, True), (False, False), (True, True)])
def test_however_often_a_state_is_loaded_its_velocity_stays_until_the_next_exchange(
    leave: tuple[bool, bool],
) -> None:
    server = dgs.ParameterServer()
    opt, state = reopened(server, None, steps=STEPS)
    expected = saved(state, "rule.velocity")
    opt.close(leave=leave[0])
    states = [state]
    for _ in range(3):
        opt, between = reopened(server, states[-1])
        assert torch.equal(velocity(opt), expected)
        states.append(between)
        opt.close(leave=leave[1])
    opt, _ = reopened(server, state)  # the first one again
    assert torch.equal(velocity(opt), expected)
    opt.close()


def test_a_checkpoint_taken_right_after_a_rejoin_goes_on_bit_for_bit() -> None:
    server = dgs.ParameterServer()
    opt, state = reopened(server, None, steps=STEPS)
    opt.close(leave=True)
    opt, between = reopened(server, state)
    opt.close(leave=False)
    opt, _ = reopened(server, between)
    assert opt.stats.rejoins == 0
    opt.close()


@pytest.mark.parametrize("method", [Method.PULL_MODEL, Method.PUT_MODEL])
def test_a_session_that_is_closed_before_it_is_used_is_opened_once_more(method: Method) -> None:
    server = dgs.ParameterServer()

    class Evicting(LocalTransport):
        """Let the lease of whoever joins run out, once."""

        evicted = False

        def call(self, called: Method, request: bytes, *, timeout_s: float) -> bytes:
            if called is method and not self.evicted:
                self.evicted = True
                for place, _ in list(server.state.registry.places()):
                    server.state.registry.close(*place)
            return super().call(called, request, timeout_s=timeout_s)

    model, transport = make_model(), Evicting(server)
    opt = wrap(model, transport, worker="w")
    assert transport.evicted
    train_step(model, opt, Batches())
    assert (opt.stats.exchanges, opt.stats.rejoins) == (1, 0)
    opt.close()
