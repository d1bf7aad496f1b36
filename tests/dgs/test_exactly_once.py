"""Faults on the way change nothing: the run equals the calm one bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from threading import Thread

import numpy as np
import pytest
import torch
from torch import nn

import dgs
from dgs.config import RetryConfig, ServerConfig, WorkerConfig
from dgs.errors import TooLargeError, UnknownWorkerError
from dgs.transport.base import Transport
from dgs.transport.retry import RetryingTransport
from tests.helpers.faults import Fault, FaultyTransport
from tests.helpers.sites import SHAPES, Site, gaussian, make_servers, server_model, space_of
from tests.helpers.training import Batches, make_model, server_loss, train_step, wrap

SIZE = space_of(SHAPES).size
NO_WAIT = RetryConfig(budget_s=1e6)


def patient(plan: Mapping[int, Fault]) -> object:
    """Wrap a transport in faults, and those in retries that wait in virtual time."""

    def wrapped(inner: Transport) -> Transport:
        now = [0.0]

        def wait(seconds: float) -> bool:
            now[0] += seconds
            return False

        return RetryingTransport(
            FaultyTransport(inner, plan), NO_WAIT, random=Random(0), clock=lambda: now[0], wait=wait
        )

    return wrapped


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("num_shards", [1, 2])
def test_each_update_is_applied_exactly_once_whatever_is_lost_on_the_way(
    fault: Fault, num_shards: int
) -> None:
    config = WorkerConfig(density=0.1, download_density=0.2, retry=NO_WAIT)
    plans: list[dict[int, Fault]] = [
        {},
        dict.fromkeys(range(6, 400, 3), fault),
    ]  # from when all have joined
    worlds = []
    for plan in plans:
        rng = np.random.default_rng(1)
        start = gaussian(rng, SIZE)
        servers = make_servers(num_shards)
        sites = [Site(f"w{i}", servers, config, start, wrap=patient(plan)) for i in range(3)]
        for _ in range(60):
            assert not sites[int(rng.integers(3))].exchange(gaussian(rng, SIZE)).diverged
        worlds.append((servers, sites))
        for site in sites:
            site.client.close(leave=False)
    (calm, calm_sites), (stormy, stormy_sites) = worlds
    assert server_model(stormy).tobytes() == server_model(calm).tobytes()
    assert [s.version for s in stormy] == [60] * num_shards
    for a, b in zip(calm_sites, stormy_sites, strict=True):
        assert a.base.tobytes() == b.base.tobytes()
        assert a.waiting().tobytes() == b.waiting().tobytes()


@pytest.mark.parametrize("num_shards", [1, 2])
def test_workers_that_really_run_at_the_same_time_stay_equal_to_their_records(
    num_shards: int,
) -> None:
    every_reply = ServerConfig(hash_interval=1)
    handles = [dgs.serve("127.0.0.1:0", config=every_reply) for _ in range(num_shards)]
    address = ",".join(h.address for h in handles)
    models = [make_model() for _ in range(4)]
    opts = [
        wrap(m, address, worker=f"w{i}", overlap=i % 2 == 1, values=v, momentum=0.3)
        for i, (m, v) in enumerate(
            zip(models, ["float32", "float32", "bfloat16", "int8"], strict=True)
        )
    ]
    failures: list[BaseException] = []

    def run(model: nn.Module, opt: dgs.DistributedOptimizer, seed: int) -> None:
        try:
            data = Batches(seed)
            for _ in range(40):
                train_step(model, opt, data)
        except BaseException as e:  # handed to the test's own thread
            failures.append(e)

    before = server_loss(opts[0])
    threads = [
        Thread(target=run, args=(m, o, i))
        for i, (m, o) in enumerate(zip(models, opts, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
    assert failures == []
    after = server_loss(opts[0])
    for opt in opts:
        opt.close()
        assert opt.stats.resyncs == 0
        assert opt.stats.exchanges == 40
    for handle in handles:
        handle.stop()
    assert after < before


def test_a_worker_whose_base_differs_says_so_counts_it_and_pulls_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = dgs.ParameterServer(ServerConfig(hash_interval=4))
    model = make_model()
    opt = wrap(model, server)
    data = Batches()
    train_step(model, opt, data)
    opt._exchanger._worker.base += 1.0  # what must never happen
    opt._exchanger._restart()
    for _ in range(2):
        train_step(model, opt, data)
    assert opt.stats.resyncs == 0  # the hash comes with every fourth reply
    train_step(model, opt, data)
    assert opt.stats.resyncs == 1
    assert "its base is not what the server has recorded of it" in caplog.text
    pulled = opt.pull_model()
    assert all(torch.equal(p, pulled[n]) for n, p in model.named_parameters())
    for _ in range(8):
        train_step(model, opt, data)
    assert opt.stats.resyncs == 1
    opt.close()


@pytest.mark.parametrize("error", [MemoryError, TooLargeError])
def test_a_defect_half_way_through_an_exchange_never_applies_it_twice(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = make_servers()
    rng = np.random.default_rng(3)
    site = Site("w", servers, WorkerConfig(density=0.2), gaussian(rng, SIZE))
    site.exchange(gaussian(rng, SIZE))
    frame = site.collect(gaussian(rng, SIZE))[0]

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("dgs.tracker.Record.advance", fails)
        with pytest.raises(error):
            servers[0].handle("Exchange", frame)
    model = server_model(servers)
    with pytest.raises(UnknownWorkerError):
        servers[0].handle("Exchange", frame)
    assert server_model(servers).tobytes() == model.tobytes()
