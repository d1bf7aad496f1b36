"""Who is turned away: each with its code and words, at once, and without a trace in the state."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import dgs
from dgs._proto import parameter_server_pb2 as pb
from dgs.client import server_status
from dgs.config import RetryConfig, WorkerConfig
from dgs.errors import ConfigError, DgsError, ForbiddenError, UnauthenticatedError
from dgs.security import ClientSecurity, ServerSecurity
from dgs.server import ParameterServer
from dgs.state import fingerprint
from dgs.transport import Method, Transport
from dgs.transport.connect import connect
from dgs.transport.gate import Gate
from dgs.transport.grpc_client import GrpcTransport
from dgs.transport.grpc_server import GrpcServerHandle, serve_handler
from dgs.transport.tokens import make_token, token_line
from tests.helpers.credentials import HOSTS, Credentials
from tests.helpers.sites import SHAPES, Site, gaussian, space_of

TIMEOUT_S = 20.0
PATIENT = RetryConfig(connect_budget_s=120.0, budget_s=120.0)
AT_ONCE_S = 15.0
"""Far less than the budget: whoever is turned away does not come again and again."""

SPACE = space_of(SHAPES)
MODEL = gaussian(np.random.default_rng(5), SPACE.size)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return Credentials(tmp_path_factory.mktemp("credentials"))


@contextmanager
def serving(security: ServerSecurity | None) -> Iterator[tuple[ParameterServer, GrpcServerHandle]]:
    core = ParameterServer(run=9)
    gate = Gate(core.state.worker_of)
    with serve_handler(core, "127.0.0.1:0", security=security, gate=gate) as handle:
        yield core, handle


@contextmanager
def reaching(address: str, security: ClientSecurity) -> Iterator[Transport]:
    (transport,) = connect(address, PATIENT, {}, security=security)
    try:
        yield transport
    finally:
        transport.close()


def join(core: ParameterServer, transport: Transport, name: str) -> Site:
    """Join as a worker; the first one gives the model."""
    config = WorkerConfig(density=0.5, download_density=0.5, retry=PATIENT)
    return Site(name, [core], config, MODEL, wrap=lambda _: transport)


def serve_one(core: ParameterServer, address: str, security: ClientSecurity, name: str) -> None:
    """Have a right client join and exchange."""
    with reaching(address, security) as transport:
        site, version = join(core, transport, name), core.version
        site.exchange(gaussian(np.random.default_rng(1), SPACE.size))
        assert core.version == version + 1


Case = tuple[
    Callable[[Credentials], ServerSecurity | None],
    Callable[[Credentials], ClientSecurity],
    type[DgsError],
    str,
]


def expired_server(files: Credentials) -> ServerSecurity:
    authority = files.elsewhere(f"expired-{time.monotonic_ns()}")
    return files.serving(authority.issue_server(HOSTS, -1))


def expired_client(files: Credentials) -> ClientSecurity:
    authority = files.elsewhere(f"expired-{time.monotonic_ns()}")
    return files.showing(authority.issue_worker("a", -1))


def of_other_host(files: Credentials) -> ServerSecurity:
    authority = files.elsewhere(f"host-{time.monotonic_ns()}")
    return files.serving(authority.issue_server(["ps.example.org"], 30))


CERTIFICATE = "does not accept this client's certificate"
HANDSHAKES: dict[str, Case] = {
    "no certificate": (
        lambda f: f.serving(),
        lambda f: f.showing(None),
        UnauthenticatedError,
        "asks for a client certificate, and none was shown: give --tls-cert",
    ),
    "certificate of another CA": (
        lambda f: f.serving(),
        lambda f: f.showing(f.stranger),
        UnauthenticatedError,
        CERTIFICATE,
    ),
    "expired certificate": (
        lambda f: f.serving(),
        expired_client,
        UnauthenticatedError,
        f"{CERTIFICATE} .*: it has expired",
    ),
    "server of another CA": (
        lambda f: f.serving(),
        lambda f: f.showing(f.workers["a"], f.other_ca.path),
        UnauthenticatedError,
        "the server's certificate is not of the CA in .*other-ca",
    ),
    "expired server": (
        expired_server,
        lambda f: f.showing(f.workers["a"]),
        UnauthenticatedError,
        "the server's certificate has expired",
    ),
    "wrong host": (
        of_other_host,
        lambda f: f.showing(f.workers["a"]),
        UnauthenticatedError,
        "the server's certificate is not for '127.0.0.1'",
    ),
    "plaintext to TLS": (
        lambda f: f.serving(),
        lambda f: ClientSecurity(),
        ConfigError,
        "speaks TLS, and was spoken to in plaintext",
    ),
    "plaintext to TLS without client certificates": (
        lambda f: f.serving(tokens=True),
        lambda f: ClientSecurity(token_file=f.tokens["a"]),
        ConfigError,
        "speaks TLS, and was spoken to in plaintext",
    ),
    "TLS to plaintext": (
        lambda f: None,
        lambda f: f.showing(f.workers["a"]),
        ConfigError,
        "does not speak TLS, and was spoken to in TLS",
    ),
    "certificate of another worker": (
        lambda f: f.serving(),
        lambda f: f.showing(f.workers["b"]),
        ForbiddenError,
        "may not act as worker 'a', only as 'b'",
    ),
    "no token": (
        lambda f: f.serving(tokens=True),
        lambda f: f.showing(None),
        UnauthenticatedError,
        "asks for a token, and none was sent",
    ),
    "wrong token": (
        lambda f: f.serving(tokens=True),
        lambda f: f.bearing(f.wrong_token),
        UnauthenticatedError,
        "does not know this token",
    ),
    "token of another worker": (
        lambda f: f.serving(tokens=True),
        lambda f: f.bearing(f.tokens["b"]),
        ForbiddenError,
        "the token of 'b' may not act as worker 'a'",
    ),
    "token for reading": (
        lambda f: f.serving(tokens=True),
        lambda f: f.bearing(f.tokens["viewer"]),
        ForbiddenError,
        "the token of 'viewer' may only read",
    ),
}


def right(files: Credentials, security: ServerSecurity | None) -> ClientSecurity:
    """Return what gets worker a in."""
    if security is None:
        return ClientSecurity()
    if security.token_file:
        return files.bearing(files.tokens["a"])
    return files.showing(files.workers["a"])


@pytest.mark.parametrize("label", HANDSHAKES)
def test_who_is_not_right_is_turned_away_at_once_and_changes_nothing(
    label: str, files: Credentials
) -> None:
    make_server, make_client, kind, words = HANDSHAKES[label]
    security = make_server(files)
    with serving(security) as (core, handle):
        if label not in ("expired server", "wrong host"):
            serve_one(core, handle.address, right(files, security), "a")
        before, start_s = fingerprint(core.state), time.monotonic()
        with reaching(handle.address, make_client(files)) as transport:
            with pytest.raises(kind, match=words):
                join(core, transport, "a")
            assert time.monotonic() - start_s < AT_ONCE_S
        assert fingerprint(core.state) == before
        if label not in ("expired server", "wrong host"):
            serve_one(core, handle.address, right(files, security), "a")


@pytest.mark.parametrize("tokens", [False, True])
def test_nobody_acts_in_another_workers_session(tokens: bool, files: Credentials) -> None:
    def client(name: str) -> ClientSecurity:
        return files.bearing(files.tokens[name]) if tokens else files.showing(files.workers[name])

    with (
        serving(files.serving(tokens=tokens)) as (core, handle),
        reaching(handle.address, client("a")) as mine,
        reaching(handle.address, client("b")) as other,
    ):
        site = join(core, mine, "a")
        site.exchange(gaussian(np.random.default_rng(1), SPACE.size))
        (frame,) = site.collect(gaussian(np.random.default_rng(2), SPACE.size))
        (ticket,) = site.client._tickets
        session = {
            "run": ticket.run,
            "worker_id": ticket.worker_id,
            "incarnation": ticket.incarnation,
        }
        pull = pb.PullRequest(**session).SerializeToString()
        leave = pb.LeaveRequest(**session).SerializeToString()
        before = fingerprint(core.state)
        for method, request in (
            (Method.EXCHANGE, frame),
            (Method.PUT_MODEL, frame),
            (Method.PULL_MODEL, pull),
            (Method.LEAVE, leave),
        ):
            with pytest.raises(ForbiddenError, match="may not act as worker 'a'"):
                other.call(method, request, timeout_s=TIMEOUT_S)
            assert fingerprint(core.state) == before, method
        assert handle.door.turned_away == 4
        site.worker.absorb(site.client.exchange([frame]))
        assert core.version == 2


def test_a_token_for_reading_reads_and_never_pushes(files: Credentials) -> None:
    with (
        serving(files.serving(tokens=True)) as (core, handle),
        reaching(handle.address, files.bearing(files.tokens["a"])) as mine,
        reaching(handle.address, files.bearing(files.tokens["viewer"])) as viewer,
    ):
        site = join(core, mine, "a")
        assert server_status(viewer, timeout_s=TIMEOUT_S).ready
        model = pb.PullRequest().SerializeToString()
        assert viewer.call(Method.PULL_MODEL, model, timeout_s=TIMEOUT_S)
        (frame,) = site.collect(gaussian(np.random.default_rng(2), SPACE.size))
        before = fingerprint(core.state)
        with pytest.raises(ForbiddenError, match=r"may only read \(pull, status\), and Exchange"):
            viewer.call(Method.EXCHANGE, frame, timeout_s=TIMEOUT_S)
        assert fingerprint(core.state) == before


@pytest.mark.parametrize(
    ("name", "admitted"), [("site-1", True), ("site-", True), ("site", False), ("x", False)]
)
def test_a_certificate_for_a_prefix_admits_the_workers_that_begin_so(
    name: str, admitted: bool, files: Credentials
) -> None:
    client = files.showing(files.workers["site-*"])
    with serving(files.serving()) as (core, handle), reaching(handle.address, client) as transport:
        if admitted:
            join(core, transport, name)
        else:
            with pytest.raises(ForbiddenError):
                join(core, transport, name)


@pytest.mark.parametrize("security", [ServerSecurity(), "tls"])
def test_beyond_loopback_a_server_lets_nobody_in_unasked(
    security: ServerSecurity | str, files: Credentials
) -> None:
    if isinstance(security, str):
        issued = files.server
        security = ServerSecurity(tls_cert=issued.certificate, tls_key=issued.key)
    with pytest.raises(ConfigError, match=r"reached from other machines.*--tls-ca.*--insecure"):
        serve_handler(ParameterServer(), "0.0.0.0:0", security=security)
    with serve_handler(
        ParameterServer(),
        "0.0.0.0:0",
        security=files.serving(),
        gate=Gate(lambda run, number: None),
    ):
        pass


@pytest.mark.parametrize("host", ["203.0.113.5", "example.org"])
def test_a_token_is_never_sent_in_plaintext_beyond_loopback(host: str, files: Credentials) -> None:
    with pytest.raises(ConfigError, match=r"is not sent to .* in plaintext"):
        GrpcTransport(f"{host}:7070", security=ClientSecurity(token_file=files.tokens["a"]))
    with serving(ServerSecurity(token_file=files.token_file)) as (core, handle):
        local = ClientSecurity(token_file=files.tokens["a"])
        serve_one(core, handle.address, local, "a")


def replace(target: Path, source: Path) -> None:
    """Replace a file by another's content, as tools that renew certificates do."""
    aside = target.with_suffix(".renewed")
    aside.touch(0o600)
    aside.write_bytes(source.read_bytes())
    os.replace(aside, target)


def test_a_server_takes_up_a_renewed_certificate_while_it_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Credentials(tmp_path / "first")
    client = files.showing(files.workers["a"])
    with serving(files.serving()) as (core, handle), reaching(handle.address, client) as before:
        site = join(core, before, "a")
        first_s = handle.door.certificate_ends_s
        renewed = files.elsewhere("renewed").issue_server(HOSTS, 300)
        with caplog.at_level(logging.WARNING, "dgs.transport"):
            replace(files.server.certificate, renewed.certificate)
            serve_one(core, handle.address, files.showing(files.workers["b"]), "b")
        assert "the old certificate stays in use" in caplog.text  # the key does not fit yet
        assert handle.door.certificate_ends_s == first_s
        replace(files.server.key, renewed.key)
        serve_one(core, handle.address, files.showing(files.workers["b"]), "b")
        assert handle.door.certificate_ends_s > first_s + 200 * 86400
        site.exchange(gaussian(np.random.default_rng(1), SPACE.size))  # its connection lives on


def test_a_server_that_trusts_another_ca_turns_away_those_of_the_old_one(tmp_path: Path) -> None:
    files = Credentials(tmp_path / "first")
    old, new = files.showing(files.workers["a"]), files.showing(files.stranger)
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(files.ca.path.read_bytes())
    issued = files.server
    security = ServerSecurity(tls_cert=issued.certificate, tls_key=issued.key, tls_ca=trusted)
    with serving(security) as (core, handle):
        serve_one(core, handle.address, old, "a")
        replace(trusted, files.other_ca.path)
        serve_one(core, handle.address, new, "a")
        with (
            reaching(handle.address, old) as late,
            pytest.raises(UnauthenticatedError, match=CERTIFICATE),
        ):
            server_status(late, timeout_s=TIMEOUT_S)


def test_a_client_shows_its_renewed_certificate_when_it_connects_again(tmp_path: Path) -> None:
    files = Credentials(tmp_path / "first")
    issued = files.workers["a"]
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(files.ca.path.read_bytes())
    client = files.showing(issued)
    server = files.server
    security = ServerSecurity(tls_cert=server.certificate, tls_key=server.key, tls_ca=trusted)
    core = ParameterServer(run=9)
    gate = Gate(core.state.worker_of)
    handle = serve_handler(core, "127.0.0.1:0", security=security, gate=gate)
    with reaching(handle.address, client) as transport:
        site = join(core, transport, "a")
        handle.stop()
        replace(trusted, files.other_ca.path)  # the old certificate would not do any more
        replace(issued.certificate, files.stranger.certificate)
        replace(issued.key, files.stranger.key)
        with serve_handler(core, handle.address, security=security, gate=gate):
            site.exchange(gaussian(np.random.default_rng(1), SPACE.size))
            assert core.version == 1


def test_tokens_are_withdrawn_and_added_while_the_server_runs(tmp_path: Path) -> None:
    files = Credentials(tmp_path / "first")
    with (
        serving(files.serving(tokens=True)) as (core, handle),
        reaching(handle.address, files.bearing(files.tokens["a"])) as transport,
    ):
        site = join(core, transport, "a")
        update = gaussian(np.random.default_rng(1), SPACE.size)
        kept = [line for line in files.token_file.read_text().splitlines() if line[:2] != "a "]
        files.token_file.write_text("\n".join(kept))
        frames = site.collect(update)
        before = fingerprint(core.state)
        with pytest.raises(UnauthenticatedError, match="does not know this token"):
            site.client.exchange(frames)
        assert fingerprint(core.state) == before
        token = make_token()
        files.token_file.write_text("\n".join([*kept, token_line("a", "exchange", token)]))
        files.write_token("a-exchange", token)
        site.worker.absorb(site.client.exchange(frames))
        assert core.version == 1


def test_a_broken_token_file_leaves_the_last_good_one_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Credentials(tmp_path / "first")
    with serving(files.serving(tokens=True)) as (core, handle):
        files.token_file.write_text("a exchange not-a-hash\n")
        with caplog.at_level(logging.WARNING, "dgs.transport"):
            serve_one(core, handle.address, files.bearing(files.tokens["a"]), "a")
        assert "line 1 is not 'NAME ROLE sha256:HEX'" in caplog.text


def test_a_server_that_is_only_away_is_waited_for_also_over_tls(files: Credentials) -> None:
    security, gates = files.serving(), Gate(lambda run, number: None)
    handle = serve_handler(ParameterServer(), "127.0.0.1:0", security=security, gate=gates)
    address = handle.address
    handle.stop()
    short = RetryConfig(connect_budget_s=1.0, budget_s=1.0)
    (transport,) = connect(address, short, {}, security=files.showing(files.workers["a"]))
    with pytest.raises(DgsError, match="connection refused"):
        server_status(transport, timeout_s=1.0)
    with suppress(DgsError):
        transport.close()


def test_both_sides_warn_before_their_certificates_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Credentials(tmp_path / "first")
    soon = files.elsewhere("soon")
    security = files.serving(soon.issue_server(HOSTS, 3))
    client = files.showing(soon.issue_worker("a", 2))
    with caplog.at_level(logging.WARNING), serving(security) as (core, handle):
        handle.door.look()
        assert "the server's certificate expires in 3.0 days" in caplog.text
        serve_one(core, handle.address, client, "a")
        told = [m for m in caplog.messages if "this client's certificate" in m]
        assert len(told) == 1
        assert "expires in 2.0 days" in told[0]


def test_a_served_shard_tells_how_it_is_secured(files: Credentials) -> None:
    with (
        dgs.serve("127.0.0.1:0", security=files.serving(tokens=True)) as handle,
        reaching(handle.address, files.bearing(files.tokens["viewer"])) as viewer,
        reaching(handle.address, files.bearing(files.wrong_token)) as wrong,
    ):
        with pytest.raises(UnauthenticatedError):
            server_status(wrong, timeout_s=TIMEOUT_S)
        told = server_status(viewer, timeout_s=TIMEOUT_S).security
        assert (told.tls, told.client_certificates, told.tokens) == (True, False, True)
        assert told.turned_away == 1
        assert abs(told.certificate_ends_s - files.server.ends.timestamp()) < 2
