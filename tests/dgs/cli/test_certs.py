"""``dgs certs`` and ``dgs token``: what they make is enough to start with."""

from __future__ import annotations

import json
import re
import shlex
import signal
import stat
import sys
from pathlib import Path

import pytest
import torch

import dgs
from dgs.cli.main import main
from dgs.errors import ForbiddenError
from tests.dgs.cli.conftest import join
from tests.helpers.processes import Spoken

VARIABLES = ("DGS_SERVER", "DGS_WORKER", "DGS_TLS_CA", "DGS_TLS_CERT", "DGS_TLS_KEY")


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the command lines that were printed."""
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


@pytest.mark.dist
def test_the_commands_that_certs_prints_start_a_server_and_its_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "certs"
    assert main(["certs", "--out", str(out), "--server", "127.0.0.1", "--workers", "a,b"]) == 0
    server_line, *worker_lines = told(capsys)
    argv = shlex.split(server_line.replace("0.0.0.0:7070", "127.0.0.1:0"))
    argv[argv.index("state/")] = str(tmp_path / "state")
    with Spoken(sys.executable, "-m", *argv, "--json") as server:
        address = json.loads(server.line_with('"address"'))["address"]
        for line, name in zip(worker_lines, ("a", "b"), strict=True):
            for word in shlex.split(line)[: len(VARIABLES)]:
                variable, _, value = word.partition("=")
                assert variable in VARIABLES
                monkeypatch.setenv(variable, value)
            monkeypatch.setenv("DGS_SERVER", address)
            opt = join(address, seed=1, worker=name)
            opt.close()
            with pytest.raises(ForbiddenError, match=f"only as '{name}'"):
                join(address, seed=1, worker="c")
        assert main(["status", "--server", address]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"yes +certificate +\d{4}-\d\d-\d\d \(in ", shown), shown
        assert main(["status", "--server", address, "--json"]) == 0
        security = json.loads(capsys.readouterr().out)["servers"][0]["security"]
        assert security["tls"]
        assert security["client_certificates"]
        assert not security["tokens"]
        assert security["turned_away"] == 2
        model = tmp_path / "model.safetensors"
        assert main(["pull", "--server", address, "--out", str(model)]) == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.ends_with() == 0


def test_workers_are_added_later_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "certs")
    assert main(["certs", "--out", out, "--server", "h", "--workers", "a"]) == 0
    assert main(["certs", "--out", out, "--workers", "b"]) == 0
    assert len(told(capsys)) == 3
    assert main(["certs", "--out", out, "--workers", "a"]) == 1
    assert "give --overwrite" in capsys.readouterr().err
    assert main(["certs", "--out", out, "--workers", "a", "--overwrite"]) == 0


@pytest.mark.parametrize(
    "argv", [(), ("--workers", "a", "--days", "0"), ("--workers", "a,,b"), ("--days", "x")]
)
def test_wrong_use_of_certs_is_told(argv: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["certs", "--out", str(tmp_path), *argv])


def test_a_token_is_private_and_the_server_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book, token = tmp_path / "tokens", tmp_path / "a.token"
    viewer = tmp_path / "viewer.token"
    lines = []
    for name, role, out in (("site-*", "exchange", token), ("viewer", "read", viewer)):
        assert main(["token", "--name", name, "--role", role, "--out", str(out)]) == 0
        lines += told(capsys)
    book.write_text("\n".join(lines))
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text().strip() not in book.read_text()
    assert main(["token", "--name", "a", "--out", str(token)]) == 1
    assert "is there already" in capsys.readouterr().err
    security = dgs.ServerSecurity(token_file=book)
    with dgs.serve("127.0.0.1:0", security=security) as handle:
        model = torch.nn.Linear(2, 2)
        for file, kind in ((token, None), (viewer, ForbiddenError)):
            client = dgs.ClientSecurity(token_file=file)

            def connect(client: dgs.ClientSecurity = client) -> dgs.DistributedOptimizer:
                return dgs.DistributedOptimizer(
                    torch.optim.SGD(model.parameters(), lr=0.1),
                    named_parameters=model.named_parameters(),
                    server=handle.address,
                    worker="site-1",
                    security=client,
                )

            if kind is None:
                connect().close()
            else:
                with pytest.raises(kind):
                    connect()
        shown = ["status", "--server", handle.address, "--token-file"]
        assert main([*shown, str(viewer)]) == 0
        assert "token" in capsys.readouterr().out
        assert main(shown[:-1]) == 1
        assert "asks for a token" in capsys.readouterr().err
