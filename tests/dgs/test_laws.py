"""What must hold whatever the rule, the coding and the number of shards."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dgs.config import WorkerConfig
from dgs.errors import FencedError
from dgs.transport.base import Method
from tests.helpers.sites import (
    SHAPES,
    Site,
    dyadic,
    gaussian,
    make_servers,
    replica,
    server_model,
    space_of,
)

SIZE = space_of(SHAPES).size
VALUES = ["float32", "bfloat16", "int8", "int4", "int2", "sign"]
RULES = ["samomentum", "residual", "dgc", "none"]


def test_at_density_one_without_momentum_it_is_sequential_asgd_bit_for_bit() -> None:
    # eq. 5: each worker is given the server's model whole, so all that asynchrony leaves is
    # gradients of stale copies, applied one after another
    rng = np.random.default_rng(0)
    theta = gaussian(rng, SIZE)
    servers = make_servers()
    config = WorkerConfig(rule="none", density=1.0, download_density=1.0)
    sites = [Site(f"w{i}", servers, config, theta) for i in range(4)]
    copies = [theta.copy() for _ in sites]
    target = gaussian(rng, SIZE)
    for _ in range(300):
        k = int(rng.integers(len(sites)))
        step = np.float32(0.1) * (copies[k] - target) + np.float32(0.01) * gaussian(rng, SIZE)
        theta = theta - step
        copies[k] = theta.copy()
        sites[k].exchange(step)
        assert sites[k].base.tobytes() == theta.tobytes()
    assert server_model(servers).tobytes() == theta.tobytes()


def test_at_zero_momentum_it_is_gradient_dropping() -> None:
    rng = np.random.default_rng(1)
    start = gaussian(rng, SIZE)
    configs = [
        WorkerConfig(rule="samomentum", momentum=0.0, density=0.1),
        WorkerConfig(rule="residual", momentum=0.9, density=0.1),
    ]
    pairs = [Site("w", make_servers(), c, start) for c in configs]
    for _ in range(100):
        step = gaussian(rng, SIZE)
        for site in pairs:
            site.exchange(step)
        assert pairs[0].base.tobytes() == pairs[1].base.tobytes()
        assert pairs[0].waiting().tobytes() == pairs[1].waiting().tobytes()


def test_at_density_one_it_is_heavy_ball_momentum() -> None:
    rng = np.random.default_rng(2)
    start = gaussian(rng, SIZE)
    site = Site(
        "w", make_servers(), WorkerConfig(momentum=0.5, density=1.0, download_density=1.0), start
    )
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    heavy_ball = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    for _ in range(100):
        step = dyadic(rng, SIZE)
        weight.grad = torch.from_numpy(step)
        heavy_ball.step()
        site.exchange(step)
        np.testing.assert_allclose(site.base, weight.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wait", [1, 2, 17])
def test_a_coordinate_that_waited_carries_its_momentum_and_the_sum_of_its_gradients(
    wait: int,
) -> None:
    # eq. 16: u_{c+T} = m * u_c + sum of the T gradients since
    m, size = 0.5, 10
    space = space_of([(size,)])
    config = WorkerConfig(momentum=m, density=0.1, download_density=1.0, selection="exact")
    site = Site("w", make_servers(), config, np.zeros(size, np.float32), space)
    first = np.zeros(size, np.float32)
    first[3] = 8.0
    site.exchange(first)  # sends coordinate 3 alone: u_c = 8
    rng = np.random.default_rng(3)
    total = 0.0
    for _ in range(wait):
        step = np.zeros(size, np.float32)
        step[3] = float(dyadic(rng, 1)[0]) / 64
        step[7] = 512.0  # always larger, so coordinate 3 waits
        total += float(step[3])
        site.exchange(step)
    site.exchange(np.eye(1, size, 3, dtype=np.float32)[0] * np.float32(2048.0))
    assert site.base[3] == -(8.0 + m * 8.0 + total + 2048.0)


CASES = [
    (rule, values, shards, selection)
    for rule, values, shards, selection in product(RULES, VALUES, [1, 2, 5], ["exact", "tracked"])
    if rule != "none" or values == "float32"
]


@pytest.mark.parametrize(("rule", "values", "num_shards", "selection"), CASES)
def test_after_every_reply_base_equals_the_servers_record_bit_for_bit(
    rule: str, values: str, num_shards: int, selection: str
) -> None:
    rng = np.random.default_rng(4)
    start = gaussian(rng, SIZE)
    servers = make_servers(num_shards)
    config = WorkerConfig(
        rule=rule,
        momentum=0.6,
        values=values,
        selection=selection,
        dense_below=3,
        density=1.0 if rule == "none" else 0.1,
        download_density=0.2,
    )
    sites = [Site(f"w{i}", servers, config, start) for i in range(3)]
    for _ in range(30):
        k = int(rng.integers(len(sites)))
        answer = sites[k].exchange(gaussian(rng, SIZE) * np.float32(0.1))
        assert not answer.diverged  # the hash in the reply
        for i, site in enumerate(sites):
            assert site.base.tobytes() == replica(servers, f"w{i}").tobytes()


@pytest.mark.parametrize("num_shards", [2, 3, 7])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("selection", ["exact", "tracked"])
def test_several_shards_give_the_same_training_as_one(
    num_shards: int, values: str, selection: str
) -> None:
    rng = np.random.default_rng(5)
    start = gaussian(rng, SIZE)
    config = WorkerConfig(values=values, selection=selection, density=0.1, download_density=0.2)
    worlds = [make_servers(1), make_servers(num_shards)]
    sites = [[Site(f"w{i}", servers, config, start) for i in range(2)] for servers in worlds]
    for _ in range(40):
        k, step = int(rng.integers(2)), gaussian(rng, SIZE)
        for world in sites:
            world[k].exchange(step)
        assert sites[0][k].base.tobytes() == sites[1][k].base.tobytes()
    assert server_model(worlds[0]).tobytes() == server_model(worlds[1]).tobytes()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_no_gradient_mass_is_lost(rule: str, num_shards: int) -> None:
    # multiples of 1/64 (1/128 after momentum) add exactly in float32, so the law is an equality
    rng = np.random.default_rng(6)
    m, density = 0.5, 1.0 if rule == "none" else 0.1
    start = dyadic(rng, SIZE)
    servers = make_servers(num_shards)
    config = WorkerConfig(rule=rule, momentum=m, density=density, download_density=0.3)
    sites = [Site(f"w{i}", servers, config, start) for i in range(3)]
    size = SIZE
    produced, velocity = np.zeros((3, size)), np.zeros((3, size))
    applied, returned = np.zeros((3, size)), np.zeros((3, size))
    for _ in range(12):
        k = int(rng.integers(3))
        step = dyadic(rng, size)
        before, known = server_model(servers).astype(np.float64), sites[k].base.copy()
        if rule == "dgc":  # what enters DGC's residual is its velocity
            dgc_velocity = sites[k].worker._rule.state()["velocity"].numpy()
            velocity[k] = m * dgc_velocity + step
            produced[k] += velocity[k]
        else:
            produced[k] += step
        sites[k].exchange(step)
        update = before - server_model(servers)
        applied[k] += update
        if rule == "samomentum":  # what was sent is put back, decayed, by the momentum itself
            produced[k] += m * update
        returned[k] += sites[k].base.astype(np.float64) - known
        np.testing.assert_array_equal(produced[k], applied[k] + sites[k].waiting())
    total = -applied.sum(axis=0)
    for k, site in enumerate(sites):
        waits = server_model(servers).astype(np.float64) - replica(servers, f"w{k}")
        np.testing.assert_array_equal(total, returned[k] + waits)
        np.testing.assert_array_equal(site.base, start + returned[k])


@pytest.mark.parametrize("values", VALUES[1:])
@pytest.mark.parametrize("rule", ["samomentum", "residual", "dgc"])
def test_rounding_of_quantised_values_is_kept_not_lost(values: str, rule: str) -> None:
    rng = np.random.default_rng(7)
    servers = make_servers()
    config = WorkerConfig(rule=rule, momentum=0.0, values=values, density=0.2, download_density=0.5)
    site = Site("w", servers, config, np.zeros(SIZE, np.float32))
    produced = np.zeros(SIZE)
    for _ in range(50):
        step = gaussian(rng, SIZE)
        produced += step
        site.exchange(step)
    np.testing.assert_allclose(
        produced, site.waiting() - server_model(servers), rtol=1e-4, atol=1e-4
    )


def test_what_is_not_returned_now_is_returned_later() -> None:
    rng = np.random.default_rng(8)
    servers = make_servers()
    config = WorkerConfig(density=0.5, download_density=0.05)
    a, b = (Site(n, servers, config, gaussian(rng, SIZE)) for n in "ab")
    for _ in range(5):
        a.exchange(gaussian(rng, SIZE))
    nothing = np.zeros(SIZE, np.float32)
    for _ in range(60):
        b.exchange(nothing)
    assert b.base.tobytes() == server_model(servers).tobytes()


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
def test_a_worker_that_is_caught_up_is_sent_nothing(values: str) -> None:
    rng = np.random.default_rng(9)
    servers = make_servers()
    config = WorkerConfig(density=0.5, download_density=1.0, values=values)
    site = Site("w", servers, config, gaussian(rng, SIZE))
    for _ in range(20):
        site.exchange(gaussian(rng, SIZE))
    site.worker._rule.state()["velocity"].zero_()
    nothing = np.zeros(SIZE, np.float32)
    for _ in range(6):  # bfloat16 differences need a few rounds to reach the last bit
        answer = site.exchange(nothing)
    assert answer.received == 0


def test_a_repeated_request_returns_the_same_bytes_and_changes_nothing() -> None:
    rng = np.random.default_rng(10)
    servers = make_servers(2)
    config = WorkerConfig(density=0.1)
    sites = [Site(n, servers, config, gaussian(rng, SIZE)) for n in "ab"]
    for site in sites:
        site.exchange(gaussian(rng, SIZE))
    frames = sites[0].collect(gaussian(rng, SIZE))
    first = sites[0].client.exchange(frames)
    model, record = server_model(servers), replica(servers, "a")
    versions = [s.version for s in servers]
    for _ in range(3):
        assert sites[0].client.exchange(frames) == first
    assert server_model(servers).tobytes() == model.tobytes()
    assert replica(servers, "a").tobytes() == record.tobytes()
    assert [s.version for s in servers] == versions
    sites[0].worker.absorb(first)
    sites[1].exchange(gaussian(rng, SIZE))
    assert sites[0].client.exchange(frames) == first  # also after others have gone on


def test_an_old_incarnation_is_refused_and_changes_nothing() -> None:
    rng = np.random.default_rng(11)
    servers = make_servers()
    config = WorkerConfig(density=0.1)
    old = Site("a", servers, config, gaussian(rng, SIZE))
    old.exchange(gaussian(rng, SIZE))
    frames = old.collect(gaussian(rng, SIZE))
    new = Site("a", servers, config, np.zeros(SIZE, np.float32))
    assert new.base.tobytes() == server_model(servers).tobytes()
    model = server_model(servers)
    with pytest.raises(FencedError, match="newer process has joined as worker 'a'"):
        old.client.exchange(frames)
    assert server_model(servers).tobytes() == model.tobytes()
    assert not new.exchange(gaussian(rng, SIZE)).diverged


@pytest.mark.parametrize("num_shards", [1, 3])
def test_counted_bytes_are_those_that_the_transports_carried(num_shards: int) -> None:
    rng = np.random.default_rng(12)
    servers = make_servers(num_shards)
    site = Site("a", servers, WorkerConfig(density=0.1), gaussian(rng, SIZE))
    up = down = 0
    for _ in range(5):
        frames = site.collect(gaussian(rng, SIZE))
        replies = site.client.exchange(frames)
        site.worker.absorb(replies)
        up, down = up + sum(map(len, frames)), down + sum(map(len, replies))
    assert (site.client.bytes_up, site.client.bytes_down) == (up, down)
    assert sum(s.state.totals.bytes_up for s in servers) == up
    assert sum(s.state.totals.bytes_down for s in servers) == down
    assert sum(t.traffic.up_bytes[Method.EXCHANGE] for t in site.transports) == up


def test_the_same_requests_give_the_same_state() -> None:
    requests: list[tuple[str, bytes]] = []

    class Recording:
        """A server that remembers what it was asked."""

        def __init__(self) -> None:
            self.server = make_servers()[0]

        def handle(self, method: str, request: bytes) -> bytes:
            requests.append((method, request))
            return self.server.handle(method, request)

        def max_request_bytes(self, method: str) -> int:
            return self.server.max_request_bytes(method)

    rng = np.random.default_rng(13)
    recording = Recording()
    config = WorkerConfig(density=0.1)
    sites = [Site(n, [recording], config, gaussian(rng, SIZE)) for n in "ab"]  # type: ignore[list-item]
    for i in range(20):
        sites[i % 2].exchange(gaussian(rng, SIZE))
    again = make_servers()[0]
    for method, request in requests:
        again.handle(method, request)
    assert server_model([again]).tobytes() == server_model([recording.server]).tobytes()
    assert replica([again], "a").tobytes() == replica([recording.server], "a").tobytes()
