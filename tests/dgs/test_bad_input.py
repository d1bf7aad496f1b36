"""Bad input gets an error that names the thing and the remedy, and changes nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dgs
from dgs.config import RetryConfig, ServerConfig, WorkerConfig
from dgs.errors import (
    ChecksumError,
    ConfigError,
    DgsError,
    MalformedError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
    SequenceError,
    ServerUnavailableError,
    TooLargeError,
    UnknownWorkerError,
    WrongRunError,
)
from dgs.frame import FrameKind, decode_frame, encode_frame
from tests.helpers.sites import (
    SHAPES,
    Site,
    gaussian,
    make_servers,
    overwrite,
    replica,
    server_model,
    space_of,
)
from tests.helpers.training import Batches, flat, make_model, train_step, wrap

SIZE = space_of(SHAPES).size
QUICK = RetryConfig(connect_budget_s=0.5, budget_s=0.5, attempt_s=0.5, first_wait_s=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"density=0.0 is not valid: give a fraction in \(0, 1\]"),
        ({"density": 1.5}, "density=1.5"),
        ({"download_density": -1}, "download_density=-1"),
        ({"density": float("nan")}, "density=nan"),
        ({"momentum": 1.0}, r"momentum=1.0 is not valid: give a number in \[0, 1\)"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"rule": "adam"}, "rule='adam' is not valid: choose one of 'samomentum', 'residual'"),
        ({"values": "fp4"}, "values='fp4'"),
        ({"view": "server"}, "view='server'"),
        ({"selection": "random"}, "selection='random'"),
        ({"local_steps": 0}, "local_steps=0"),
        ({"rule": "none", "density": 0.1}, "use rule='residual' to send less"),
        ({"rule": "none", "density": 1.0, "values": "int8"}, "values='float32'"),
        ({"worker": "x" * 200}, "at most 128 characters"),
        ({"densty": 0.1}, "unknown setting densty; the settings are rule, momentum, density"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    server, model = dgs.ParameterServer(), make_model()
    with pytest.raises(ConfigError, match=message):
        wrap(model, server, **settings)
    assert server.space is None


@pytest.mark.parametrize("name", ["hash_interval", "max_workers"])
def test_server_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=-1"):
        ServerConfig(**{name: -1})
    with pytest.raises(ConfigError, match="budget_s=0"):
        RetryConfig(budget_s=0)


def test_a_wrong_address_says_which_and_how_long_it_tried() -> None:
    with pytest.raises(ServerUnavailableError, match=r"server 127.0.0.1:1 after 0.\d s"):
        wrap(make_model(), "127.0.0.1:1", retry=QUICK)
    with pytest.raises(ConfigError, match="'localhost' is not a server address"):
        wrap(make_model(), "localhost")


def test_a_missing_address_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DGS_SERVER", raising=False)
    model = make_model()
    with pytest.raises(ConfigError, match="set DGS_SERVER, or start the script with 'dgs launch'"):
        dgs.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters()
        )


def test_another_model_is_refused_with_the_tensor_and_both_shapes() -> None:
    server, model = dgs.ParameterServer(), make_model()
    opt = wrap(model, server)
    other = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5))
    with pytest.raises(
        ModelMismatchError, match=r"tensor '2.weight' has shape \[3, 24\] here and \[5, 24\] there"
    ):
        wrap(other, server)
    assert server.space is not None
    train_step(model, opt, Batches())
    opt.close()


def test_an_initial_model_that_does_not_fit_is_refused_and_a_fitting_worker_still_starts() -> None:
    model = make_model()
    init = {n: p.detach().numpy() + 1 for n, p in model.named_parameters()}
    server = dgs.ParameterServer(init=init)
    with pytest.raises(ModelMismatchError, match=r"'0.weight' has shape \[24, 12\] instead of"):
        wrap(nn.Sequential(nn.Linear(3, 3)), server)
    bigger = make_model()
    bigger.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ModelMismatchError, match=r"'extra' of shape .* is missing"):
        wrap(bigger, server)
    opt = wrap(model, server)
    assert torch.equal(model[0].weight, torch.from_numpy(init["0.weight"]))
    opt.close()


def test_parameters_without_a_name_or_of_a_wrong_dtype_are_refused() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=r"pass model\.named_parameters"):
        dgs.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            named_parameters=model[0].named_parameters(),
            server=dgs.ParameterServer(),
        )
    with pytest.raises(ConfigError, match=r"parameter '0\.weight' is torch\.float64"):
        wrap(make_model(dtype=torch.float64), dgs.ParameterServer())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("local_steps", [1, 3])
def test_a_step_to_nan_is_refused_whole_counted_and_named(
    poison: float, overlap: bool, local_steps: int
) -> None:
    server, model = dgs.ParameterServer(), make_model()
    opt = wrap(model, server, overlap=overlap, local_steps=local_steps)
    data = Batches()
    for _ in range(2 * local_steps):
        train_step(model, opt, data)
    opt.state_dict()  # lets what is in flight land
    start, version = flat(model), server.version
    velocity = opt._exchanger._worker.state()["rule.velocity"]
    for _ in range(local_steps - 1):
        train_step(model, opt, data)
    model[2].weight.grad[1, 3] = poison
    with pytest.raises(NonFiniteError, match=r"made parameter '2\.weight' NaN or infinite"):
        opt.step()
    assert torch.equal(flat(model), start)
    assert torch.equal(opt._exchanger._worker.state()["rule.velocity"], velocity)
    assert opt.stats.refused == 1
    assert server.version == version
    for _ in range(local_steps):  # and training goes on
        train_step(model, opt, data)
    opt.close()
    assert server.version == version + 1


@pytest.mark.parametrize("selection", ["exact", "tracked"])
def test_a_velocity_that_overflows_is_named_its_overflow_dropped_and_training_goes_on(
    selection: str,
) -> None:
    server, model = dgs.ParameterServer(ServerConfig(hash_interval=1)), nn.Linear(40, 10)
    opt = wrap(
        model,
        server,
        lambda m: torch.optim.SGD(m.parameters(), lr=1.0),
        selection=selection,
        momentum=0.0,
    )

    def step(size: float, rows: slice) -> None:
        model.weight.grad = torch.zeros(10, 40)
        model.weight.grad[rows] = torch.linspace(0.9, 1.0, 400).view(10, 40)[rows] * size
        opt.step()

    step(3e38, slice(0, 10))
    start = flat(model)
    with pytest.raises(NonFiniteError, match="velocity of tensor 'weight' is not finite any more"):
        step(3e38, slice(0, 5))  # none of these was sent, so all of it waits in the velocity
    assert opt.stats.refused == 1
    assert torch.equal(flat(model), start)
    assert bool(torch.isfinite(opt._exchanger._worker.state()["rule.velocity"]).all())
    for _ in range(3):
        step(1.0, slice(0, 10))
    assert opt.stats.resyncs == 0
    opt.close()


class Damaged:
    """One site and its server, and a way to send what no honest worker sends."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.servers = make_servers()
        config = WorkerConfig(density=0.2, retry=QUICK)
        self.site = Site("w", self.servers, config, gaussian(self.rng, SIZE))
        self.site.exchange(gaussian(self.rng, SIZE))
        self.frame = self.site.collect(gaussian(self.rng, SIZE))[0]

    def state(self) -> tuple[bytes, bytes, int]:
        """Return all that a refusal must leave alone."""
        model, record = server_model(self.servers), replica(self.servers, "w")
        return model.tobytes(), record.tobytes(), self.servers[0].version

    def refuses(self, frame: bytes, error: type[DgsError], message: str) -> None:
        """Check the error, the state, the count, and that the honest frame still goes through."""
        before, refused = self.state(), self.servers[0].state.totals.refused
        with pytest.raises(error, match=message):
            self.servers[0].handle("Exchange", frame)
        assert self.state() == before
        assert self.servers[0].state.totals.refused == refused + 1

    def changed(self, **fields: Any) -> bytes:
        """Re-encode the honest frame with other header fields."""
        frame = decode_frame(self.frame)
        return encode_frame(replace(frame.header, **fields), frame.body, frame.tail)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"seq": 5}, SequenceError, "exchange 5 of worker 'w' does not follow 1"),
        ({"seq": 0}, SequenceError, "exchange 0"),
        ({"run": 3}, WrongRunError, "not the one that was joined"),
        ({"worker_id": 9}, UnknownWorkerError, "number 9"),
        ({"member": 1}, UnknownWorkerError, "no such session"),
        ({"incarnation": 2**63}, UnknownWorkerError, "no such session"),
        ({"size": SIZE + 1}, MalformedError, f"holds {SIZE} and 0 of this shard"),
        ({"kind": FrameKind.DIFFERENCE}, MalformedError, "an Exchange carries an update"),
        ({"nnz": 3}, MalformedError, "3"),
    ],
)
def test_frames_with_wrong_fields_are_refused(
    fields: dict[str, Any], error: type[DgsError], message: str
) -> None:
    damaged = Damaged()
    damaged.refuses(damaged.changed(**fields), error, message)
    damaged.site.worker.absorb([damaged.servers[0].handle("Exchange", damaged.frame)])


def test_damaged_frames_are_refused() -> None:
    damaged = Damaged()
    flipped = bytearray(damaged.frame)
    flipped[-3] ^= 0x40
    damaged.refuses(bytes(flipped), ChecksumError, "checksum")
    damaged.refuses(damaged.frame[:-5], ChecksumError, "send it again")
    damaged.refuses(damaged.frame[:20], MalformedError, "bytes")
    damaged.refuses(b"", MalformedError, "bytes")
    damaged.refuses(b"GET / HTTP/1.1\r\n" + bytes(200), MalformedError, "begins with b'DGSF'")
    damaged.refuses(damaged.frame + bytes(2 << 20), TooLargeError, "bytes")
    damaged.site.worker.absorb([damaged.servers[0].handle("Exchange", damaged.frame)])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_updates_with_nan_or_inf_are_refused_whole_and_name_the_tensor(poison: float) -> None:
    damaged = Damaged()
    frame = decode_frame(damaged.frame)
    body = bytearray(frame.body)
    body[-4:] = np.float32(poison).tobytes()  # the last value is of the last tensor that sends
    poisoned = encode_frame(frame.header, bytes(body))
    damaged.refuses(poisoned, NonFiniteError, "worker 'w' holds NaN or Inf in tensor 't5'")


def test_updates_that_overflow_the_model_are_refused_whole() -> None:
    damaged = Damaged()
    huge = np.full(SIZE, np.finfo(np.float32).max, np.float32)
    servers = make_servers()
    site = Site("w", servers, WorkerConfig(momentum=0.0, density=1.0), -huge)
    frames = site.collect(huge)
    before = server_model(servers)
    with pytest.raises(NonFiniteError, match="overflows the model in tensor 't0'"):
        site.client.exchange(frames)
    assert server_model(servers).tobytes() == before.tobytes()
    assert damaged.servers[0].version == 1


@pytest.mark.parametrize("method", ["Join", "PullModel", "Leave", "Status"])
def test_control_messages_that_do_not_parse_are_refused(method: str) -> None:
    server = make_servers()[0]
    with pytest.raises(MalformedError, match="the request is not a"):
        server.handle(method, b"\xff\xff\xff")


def test_unknown_methods_and_an_empty_server_say_so() -> None:
    server = make_servers()[0]
    with pytest.raises(MalformedError, match="no method 'Reset'"):
        server.handle("Reset", b"")
    with pytest.raises(NotReadyError, match="no worker has joined"):
        server.handle("PullModel", b"")


def test_the_admitted_number_of_workers_is_a_limit() -> None:
    servers = [dgs.ParameterServer(ServerConfig(max_workers=2))]
    rng = np.random.default_rng(0)
    config = WorkerConfig()
    sites = [Site(n, servers, config, gaussian(rng, SIZE)) for n in "ab"]
    with pytest.raises(TooLargeError, match="2 sessions are open, as many as this server admits"):
        Site("c", servers, config, gaussian(rng, SIZE))
    sites[0].client.close(leave=True)
    Site("c", servers, config, gaussian(rng, SIZE))  # a worker that leaves frees its record
    Site("b", servers, config, gaussian(rng, SIZE))  # a restarted worker takes its own place


def test_servers_listed_in_another_order_are_refused() -> None:
    servers = make_servers(2)
    rng = np.random.default_rng(0)
    Site("a", servers, WorkerConfig(), gaussian(rng, SIZE))
    with pytest.raises(ModelMismatchError, match="is shard 1 of 2, and was joined as shard 0 of 2"):
        Site("b", servers[::-1], WorkerConfig(), gaussian(rng, SIZE))
    with pytest.raises(ModelMismatchError, match="shard 0 of 2, and was joined as shard 0 of 1"):
        Site("b", servers[:1], WorkerConfig(), gaussian(rng, SIZE))


def test_a_server_that_lost_its_state_is_noticed() -> None:
    server, model = dgs.ParameterServer(), make_model()
    with dgs.serve("127.0.0.1:0") as handle:
        address = handle.address
        opt = wrap(model, address, retry=replace(QUICK, budget_s=10.0, attempt_s=5.0))
        train_step(model, opt, Batches())
    with dgs.serve(address), pytest.raises(WrongRunError, match="restarted without its state"):
        train_step(model, opt, Batches())
    opt.close()
    assert server.space is None


def test_a_server_that_is_gone_ends_in_an_error_after_the_budget() -> None:
    model = make_model()
    with dgs.serve("127.0.0.1:0") as handle:
        opt = wrap(model, handle.address, retry=QUICK)
        train_step(model, opt, Batches())
    with pytest.raises(ServerUnavailableError, match=r"gave up on server 127.0.0.1:\d+ after"):
        train_step(model, opt, Batches())
    opt.close()


def test_an_optimizer_used_after_a_fork_or_after_closing_says_so() -> None:
    script = """
        import os, torch, dgs
        model = torch.nn.Linear(3, 2)
        with dgs.serve("127.0.0.1:0") as handle:
            opt = dgs.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1),
                named_parameters=model.named_parameters(), server=handle.address)
            opt.step()
            pid = os.fork()
            if pid == 0:
                try:
                    opt.step()
                except dgs.errors.ForkError as e:
                    os._exit(0 if "make it in the child process" in str(e) else 2)
                os._exit(1)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            opt.step()
            opt.close()
            try:
                opt.step()
            except dgs.errors.ConfigError as e:
                assert "closed" in str(e)
            else:
                status = 3
        raise SystemExit(status)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        timeout=90,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("overlap", [False, True])
def test_an_update_that_one_shard_refuses_leaves_all_shards_in_step(overlap: bool) -> None:
    servers = [dgs.ParameterServer(ServerConfig(hash_interval=1)) for _ in range(2)]
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    opt = wrap(
        model,
        servers,
        lambda m: torch.optim.SGD(m.parameters(), lr=1.0),
        density=1.0,
        download_density=1.0,
        momentum=0.0,
        overlap=overlap,
    )

    def step(first: float, second: float) -> None:
        model[0].weight.grad = torch.full((4, 4), first)
        model[1].weight.grad = torch.full((4, 4), second)
        opt.step()

    step(1.0, 1.0)
    opt.state_dict()
    overwrite(servers[1], -3e38)  # so that the next update overflows there, and only there
    if overlap:
        step(1.0, 3e38)  # only starts the exchange that the next step waits for
    with pytest.raises(NonFiniteError, match=r"overflows the model in tensor '1\.weight'"):
        step(0.0, 0.0 if overlap else 3e38)
    assert opt.stats.refused == 1
    for _ in range(3):
        step(1.0, 0.0)
    opt.state_dict()
    assert [s.version for s in servers] == [opt.stats.exchanges] * 2
    assert opt.stats.resyncs == 0
    opt.close()


def test_buffers_that_become_nan_are_refused_and_masks_of_infinities_stay_local() -> None:
    model = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model.register_buffer("mask", torch.full((3, 3), -torch.inf))
    opt = wrap(model, dgs.ParameterServer())
    assert "mask" not in opt.pull_model()
    train_step(model, opt, Batches())
    start = flat(model)
    opt.zero_grad()
    Batches().loss(model).backward()
    model[1].running_var[2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"made buffer '1\.running_var' NaN or infinite"):
        opt.step()
    assert torch.equal(flat(model), start)
    assert torch.isfinite(model[1].running_var).all()
    opt.close()
