"""Who gives the model, who starts from it, and what a server remembers of whom."""

from __future__ import annotations

import numpy as np
import pytest

from dgs._proto import parameter_server_pb2 as pb
from dgs.client import Client, Joined, pull_model, server_status
from dgs.config import RetryConfig, WorkerConfig
from dgs.errors import (
    ConfigError,
    FencedError,
    MalformedError,
    ModelMismatchError,
    NotReadyError,
    ServerUnavailableError,
    UnknownWorkerError,
    ViewError,
)
from dgs.messages import views_to_message
from dgs.server import ParameterServer
from dgs.space import ParameterSpace
from dgs.transport.base import Method, Traffic
from dgs.transport.local import LocalTransport
from dgs.view import Slab, View
from tests.helpers.sites import (
    SHAPES,
    Site,
    gaussian,
    make_servers,
    replica,
    server_model,
    sessions,
    space_of,
)

SPACE = space_of(SHAPES, [(4,), (2, 2)])
CONFIG = WorkerConfig(density=0.2)


def client_of(servers: list[ParameterServer], name: str, space: ParameterSpace = SPACE) -> Client:
    """Connect without joining."""
    return Client([LocalTransport(s) for s in servers], CONFIG, name, [View.whole(space)])


def join_request(**fields: object) -> bytes:
    """Build a join request of a fresh worker, with some fields changed."""
    client = client_of(make_servers(), "w")
    client._incarnation = 1
    request = client._join_request(0, may_initialise=True)
    request.MergeFrom(pb.JoinRequest(**fields))
    return request.SerializeToString()


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_the_first_to_join_gives_every_shard_its_model(num_shards: int) -> None:
    servers = make_servers(num_shards)
    start = gaussian(np.random.default_rng(0), SPACE.size)
    first, second = client_of(servers, "first"), client_of(servers, "second")
    assert first.join(lambda: start).gave_model
    joined = second.join(lambda: pytest.fail("the servers have a model"))
    assert not joined.gave_model
    assert server_model(servers).tobytes() == start.tobytes()
    pulled = pull_model([LocalTransport(s) for s in servers], timeout_s=1)
    assert SPACE.flatten(pulled).tobytes() == start.tobytes()


def test_others_wait_while_the_model_is_being_given() -> None:
    server = make_servers()[0]
    first = join_request(worker="first")
    assert pb.JoinReply.FromString(server.handle("Join", first)).outcome == pb.JoinReply.GIVE_MODEL
    with pytest.raises(NotReadyError, match="worker 'first' was asked to give the model"):
        server.handle("Join", join_request(worker="second"))
    again = pb.JoinReply.FromString(server.handle("Join", first))
    assert again.outcome == pb.JoinReply.GIVE_MODEL  # repeated, the answer is the same


def test_another_worker_takes_over_from_one_that_never_gives_the_model() -> None:
    server = make_servers()[0]
    server.handle("Join", join_request(worker="lost"))

    class Impatient(LocalTransport):
        """Gives up at once, as a retrying transport does after its budget."""

        def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
            try:
                return super().call(method, request, timeout_s=timeout_s)
            except NotReadyError as e:
                raise ServerUnavailableError("gave up") from e

    start = gaussian(np.random.default_rng(0), SPACE.size)
    client = Client([Impatient(server)], CONFIG, "second", [View.whole(SPACE)])
    assert client.join(lambda: start).gave_model
    assert server_model([server]).tobytes() == start.tobytes()
    late = client_of([server], "lost")
    assert not late.join(lambda: pytest.fail("the server has a model")).gave_model


def test_a_shard_waits_for_the_worker_that_gave_the_first_one() -> None:
    servers = make_servers(2)
    start = gaussian(np.random.default_rng(0), SPACE.size)
    client = client_of(servers, "first")
    whole = client._transports
    client._transports = [whole[0], _Broken()]
    with pytest.raises(ServerUnavailableError):
        client.join(lambda: start)
    with pytest.raises(NotReadyError, match="the worker that gave shard 0 must give this one"):
        client_of(servers, "second").join(lambda: start * 2)
    again = client_of(servers, "first")
    assert again.join(lambda: start).gave_model
    assert server_model(servers).tobytes() == start.tobytes()


class _Broken:
    """A server that cannot be reached."""

    address = "broken"
    traffic = Traffic()

    def call(self, method: Method, request: bytes, *, timeout_s: float) -> bytes:
        raise ServerUnavailableError("broken")

    def close(self) -> None:
        pass


def test_a_worker_joining_under_way_gets_one_version_and_a_record_equal_to_it() -> None:
    rng = np.random.default_rng(1)
    servers = make_servers(2)
    sites = [Site(n, servers, CONFIG, gaussian(rng, space_of(SHAPES).size)) for n in "ab"]
    for i in range(10):
        sites[i % 2].exchange(gaussian(rng, sites[0].worker.base.numel()))
    client = Client(sites[0].transports, CONFIG, "late", [View.whole(space_of(SHAPES))])
    joined = client.join(lambda: pytest.fail("the servers have a model"))
    sites[0].exchange(gaussian(rng, sites[0].worker.base.numel()))  # the record stands still
    late = Site("other", servers, CONFIG, server_model(servers))
    assert joined.models is not None
    late.worker.join(joined.tickets, joined.models)
    assert late.base.tobytes() == replica(servers, "late").tobytes()
    assert late.base.tobytes() != server_model(servers).tobytes()


def test_leaving_frees_the_record_and_can_be_repeated() -> None:
    servers = make_servers()
    rng = np.random.default_rng(2)
    site = Site("a", servers, CONFIG, gaussian(rng, space_of(SHAPES).size))
    site.exchange(gaussian(rng, site.worker.base.numel()))
    t = site.worker.tickets[0]
    frames = site.collect(gaussian(rng, site.worker.base.numel()))
    leave = pb.LeaveRequest(run=t.run, worker_id=t.worker_id, incarnation=t.incarnation)
    for _ in range(2):
        servers[0].handle("Leave", leave.SerializeToString())
    assert list(sessions(servers[0])) == []
    with pytest.raises(UnknownWorkerError, match="it never joined, or left"):
        site.client.exchange(frames)
    status = server_status(site.transports[0], timeout_s=1)
    assert status.bytes_up > 0  # what the departed sent still counts


def test_leaving_late_does_not_free_the_record_of_a_newer_incarnation() -> None:
    servers = make_servers()
    rng = np.random.default_rng(3)
    start = gaussian(rng, space_of(SHAPES).size)
    old = Site("a", servers, CONFIG, start)
    new = Site("a", servers, CONFIG, start)
    t = old.worker.tickets[0]
    leave = pb.LeaveRequest(run=t.run, worker_id=t.worker_id, incarnation=t.incarnation)
    with pytest.raises(FencedError):
        servers[0].handle("Leave", leave.SerializeToString())
    new.exchange(gaussian(rng, start.size))


def test_an_older_incarnation_cannot_join_any_more() -> None:
    servers = make_servers()
    Site("w", servers, CONFIG, gaussian(np.random.default_rng(4), space_of(SHAPES).size))
    with pytest.raises(FencedError, match="give each worker its own name, or check the clock"):
        servers[0].handle("Join", join_request(tensors=()))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"protocol": 99}, ModelMismatchError, "speaks wire version 99, this server 1"),
        ({"worker": "x" * 129}, MalformedError, "field worker"),
        ({"num_shards": 5000}, MalformedError, "field shard"),
        ({"shard": 3}, MalformedError, "field shard"),
        ({"download_density": 1.5}, MalformedError, "field download_density"),
        ({"values": "fp4"}, MalformedError, "field values"),
        ({"selection": "best"}, MalformedError, "field selection"),
        ({"member": 4}, MalformedError, "field member"),
        ({"tensors": [pb.TensorSpec(name="t0")]}, ViewError, "names tensor 't0' twice"),
    ],
)
def test_join_requests_that_cannot_be_are_refused(
    fields: dict[str, object], error: type[Exception], message: str
) -> None:
    server = make_servers()[0]
    with pytest.raises(error, match=message):
        server.handle("Join", join_request(**fields))
    assert not server.ready
    assert server.space is None


def halves(first: tuple[int, int], second: tuple[int, int]) -> list[pb.View]:
    """Split the first tensor's rows between two members; the second holds all other tensors."""
    space = SPACE
    rest = [s for s in View.whole(space).slabs if s.tensor > 0]
    a, b = (Slab(0, (lo, 0), (hi - lo, 5)) for lo, hi in (first, second))
    return views_to_message([View(space, (a,)), View(space, (b, *rest))])


def test_views_with_gaps_or_overlaps_are_refused_with_the_tensors_name() -> None:
    server = make_servers()[0]
    with pytest.raises(ViewError, match=r"no member holds 5 of the 35 coordinates of tensor 't0'"):
        server.handle("Join", join_request(views=halves((0, 3), (4, 7))))
    with pytest.raises(ViewError, match="members 0 and 1 both hold a part of tensor 't0'"):
        server.handle("Join", join_request(views=halves((0, 4), (3, 7))))
    unknown = [pb.View(slabs=[pb.Slab(tensor=70, offset=[0], shape=[1])])]
    with pytest.raises(ViewError, match="names tensor 70; the model has 8"):
        server.handle("Join", join_request(views=unknown))
    assert not server.ready


def test_members_exchange_their_own_slabs_of_one_model() -> None:
    rng = np.random.default_rng(5)
    space = space_of(SHAPES)
    servers = make_servers(2)
    whole = Site("whole", servers, CONFIG, gaussian(rng, space.size))
    columns = [Slab(0, (0, 0), (7, 2)), Slab(0, (0, 2), (7, 3))]
    rest = tuple(s for s in View.whole(space).slabs if s.tensor > 0)
    views = [View(space, (columns[0],)), View(space, (columns[1], *rest))]
    members = []
    for i, view in enumerate(views):
        member = Site.__new__(Site)
        member.transports = whole.transports
        member.client = Client(whole.transports, CONFIG, "group", views, member=i)
        member.worker = type(whole.worker)(view, 2, CONFIG)
        members.append(member)
    incarnations: list[int] = []
    for member in members:  # a group joins as one incarnation
        if incarnations:
            member.client._incarnation = incarnations[0]
        joined = _join_as(member.client, incarnations)
        member.worker.join(joined.tickets, joined.models)
    for _ in range(15):
        whole.exchange(gaussian(rng, space.size))
        for member in members:
            answer = member.exchange(gaussian(rng, member.worker.base.numel()))
            assert not answer.diverged
    wide = WorkerConfig(density=1.0, download_density=1.0)
    assert whole.worker.base.numel() == sum(m.worker.base.numel() for m in members)
    check = Site("check", servers, wide, server_model(servers))
    for member, view in zip(members, views, strict=True):
        mine = view.to_global(np.arange(view.size))
        waits = check.base[mine] - member.base
        assert (waits == 0).any()  # what the group sent came back to it


def _join_as(client: Client, incarnations: list[int]) -> Joined:
    """Join with the incarnation of the group's first member."""
    import time
    from unittest.mock import patch

    clock = incarnations[0] if incarnations else time.time_ns()
    client._incarnation = 0
    with patch("dgs.client.time.time_ns", return_value=clock):
        joined = client.join(lambda: pytest.fail("the servers have a model"))
    incarnations.append(client._incarnation)
    return joined


def test_pulling_names_servers_that_are_listed_wrongly() -> None:
    servers = make_servers(2)
    Site("a", servers, CONFIG, gaussian(np.random.default_rng(6), space_of(SHAPES).size))
    transports = [LocalTransport(s) for s in servers]
    with pytest.raises(ConfigError, match="is shard 1 of 2, but was listed as 0 of 2"):
        pull_model(transports[::-1], timeout_s=1)
    with pytest.raises(ConfigError, match="is shard 0 of 2, but was listed as 0 of 1"):
        pull_model(transports[:1], timeout_s=1)
    with pytest.raises(NotReadyError, match="local has no model yet"):
        pull_model([LocalTransport(make_servers()[0])], timeout_s=1)


def test_a_closed_client_says_so_and_closing_twice_is_fine() -> None:
    servers = make_servers()
    site = Site("a", servers, CONFIG, gaussian(np.random.default_rng(7), space_of(SHAPES).size))
    for _ in range(2):
        site.client.close(leave=True)
    with pytest.raises(ConfigError, match="closed"):
        site.client.pull_model()
    assert RetryConfig().budget_s > 0
