"""`dgs server` starts or says why not, and ends when told to."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import save_file

import dgs
from dgs.authority import Authority
from dgs.cli.main import main
from dgs.errors import ModelMismatchError
from tests.dgs.cli.conftest import join
from tests.helpers.processes import Spoken
from tests.helpers.scripts.train import make_model


def test_port_in_use_is_named(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", "--listen", server]) == 1
    assert f"cannot listen on {server}: another process does" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["7070", "127.0.0.1:99999", "http://127.0.0.1:7070"])
def test_wrong_address_is_named(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", "--listen", address]) == 1
    assert repr(address) in capsys.readouterr().err


def test_wrong_initial_model_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "absent.safetensors"
    assert main(["server", "--listen", "127.0.0.1:0", "--init", str(path)]) == 1
    assert f"dgs: error: cannot read {path}" in capsys.readouterr().err


@pytest.mark.parametrize("files", [(), ("--tls-cert", "server.pem", "--tls-key", "server.key")])
def test_server_beyond_loopback_is_refused_unless_that_is_said(
    files: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issued = Authority(tmp_path).issue_server(["127.0.0.1"], 1)
    paths = {"server.pem": str(issued.certificate), "server.key": str(issued.key)}
    argv = ["server", "--listen", "0.0.0.0:0", *(paths.get(f, f) for f in files)]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "can be reached from other machines" in said
    assert "--tls-ca" in said
    assert "--insecure" in said


@pytest.mark.dist
def test_server_starts_from_a_file_warns_logs_and_ends_when_told(tmp_path: Path) -> None:
    path, given = tmp_path / "init.safetensors", make_model(seed=3)
    save_file(given.state_dict(), path)
    argv = (
        "server",
        "--listen",
        "0.0.0.0:0",
        "--insecure",
        "--init",
        str(path),
        "--json",
        "--verbose",
    )
    with Spoken(sys.executable, "-m", "dgs", *argv) as server:
        told = json.loads(server.line_with('"address"'))
        assert (
            "1 integer or boolean tensors are not trained: 1.num_batches_tracked" in server.output
        )
        assert (
            "--insecure was given: whoever reaches the port can read and change the model"
            in server.output
        )
        assert told["pid"] == server.process.pid
        address = told["address"].replace("0.0.0.0", "127.0.0.1")

        other = torch.nn.Linear(2, 2)
        with pytest.raises(ModelMismatchError, match=rf"starts from {path}, .*'weight'"):
            join_with(other, address)
        server.line_with(f"refused a worker: the server starts from {path}, ")

        opt = join(address, seed=4)
        server.line_with("worker first (member 0) joined at version 0")
        for name, tensor in opt.pull_model().items():
            assert torch.equal(tensor, given.state_dict()[name]), name
        with pytest.raises(ModelMismatchError, match="is not the server's"):
            join_with(other, address)
        server.line_with("refused Join: model-mismatch")
        newer = join(address, seed=4)
        server.line_with(
            "worker first (member 0) joined again, in place of its earlier process, at version 0"
        )
        newer.close()
        opt.close()
        server.line_with("worker first (member 0) left")

        server.process.send_signal(signal.SIGTERM)
        assert server.ends_with() == 0


def join_with(model: torch.nn.Module, address: str) -> None:
    dgs.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        server=address,
    )


@pytest.mark.dist
def test_second_signal_ends_a_server_that_waits_for_an_exchange() -> None:
    argv = ("server", "--listen", "127.0.0.1:0", "--json", "--verbose")
    with Spoken(sys.executable, "-m", "dgs", *argv) as server:
        address = json.loads(server.line_with('"address"'))["address"]
        over = threading.Event()

        def endless() -> Iterator[bytes]:
            yield b""
            over.wait(60.0)

        with grpc.insecure_channel(address) as channel:
            exchange = channel.stream_stream("/dgs.v1.ParameterServer/Exchange")(endless())
            # answered after the exchange has arrived, as both use one connection
            channel.unary_unary("/dgs.v1.ParameterServer/Status")(b"", timeout=60.0)
            server.process.send_signal(signal.SIGINT)
            server.line_with("ending; exchanges in progress have 5 s")
            server.process.send_signal(signal.SIGINT)
            assert server.ends_with() == 128 + signal.SIGINT
            over.set()
            exchange.cancel()
