"""Who gives the model, who starts from it, and what a server remembers of whom."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest

from dgs._proto import parameter_server_pb2 as pb
from dgs.client import Client, Joined, pull_model, server_status
from dgs.config import RetryConfig, ServerConfig, WorkerConfig
from dgs.errors import (
    ConfigError,
    FencedError,
    MalformedError,
    ModelMismatchError,
    NotReadyError,
    ServerUnavailableError,
    TooLargeError,
    UnknownWorkerError,
    ViewError,
)
from dgs.joining import Joining
from dgs.messages import space_to_message, views_from_message, views_to_message
from dgs.server import ParameterServer
from dgs.space import ParameterSpace
from dgs.transport.base import Method, Traffic
from dgs.transport.local import LocalTransport
from dgs.view import Part, Slab, View
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
    t = site.worker.dialog.tickets[0]
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
    t = old.worker.dialog.tickets[0]
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
        ({"worker": ""}, MalformedError, "field worker .* 1 to 128 printable"),
        ({"worker": "w\x1b[2J"}, MalformedError, "field worker .* 1 to 128 printable"),
        ({"incarnation": 0}, MalformedError, "field incarnation .* above 0"),
        ({"num_shards": 0}, MalformedError, "field num_shards .* 1 to 1024"),
        ({"num_shards": 1025}, MalformedError, "field num_shards .* 1 to 1024"),
        ({"shard": 1}, MalformedError, "field shard .* below num_shards, which is 1"),
        ({"download_density": 0.0}, MalformedError, "field download_density"),
        ({"download_density": np.nan}, MalformedError, r"field download_density .* in \(0, 1\]"),
        ({"download_density": 1.5}, MalformedError, "field download_density"),
        ({"values": "fp4"}, MalformedError, "field values .* one of float32, bfloat16, int8"),
        ({"selection": "best"}, MalformedError, "field selection .* one of tracked, exact"),
        ({"member": 1}, MalformedError, "field member .* below 1, the number of views"),
        ({"member": 2**32 - 1}, MalformedError, "field member"),
        ({"tensors": [pb.TensorSpec(name="t0")]}, ViewError, "names tensor 't0' twice"),
    ],
)
def test_join_requests_that_cannot_be_are_refused(
    fields: dict[str, object], error: type[Exception], message: str
) -> None:
    server = make_servers()[0]
    request = pb.JoinRequest.FromString(join_request())
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(request, name).extend(value)
        else:
            setattr(request, name, value)
    with pytest.raises(error, match=message):
        server.handle("Join", request.SerializeToString())
    assert not server.ready
    assert server.space is None
    assert list(sessions(server)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"resume_incarnation": 2**64 - 1, "resume_seq": 2**64 - 1, "resume_in_flight": True},
        {"incarnation": 2**64 - 1, "dense_below": 2**32 - 1},
        {"num_shards": 1024, "shard": 1023},  # more shards than the model has values
        {"num_shards": 1024, "shard": 0},
    ],
)
def test_extreme_but_possible_fields_are_harmless(fields: dict[str, int]) -> None:
    server = make_servers()[0]
    request = join_request(**fields)
    assert pb.JoinReply.FromString(server.handle("Join", request)).outcome == (
        pb.JoinReply.GIVE_MODEL
    )
    again = pb.JoinReply.FromString(server.handle("Join", request))
    assert again.outcome == pb.JoinReply.GIVE_MODEL


def joining(config: ServerConfig | None = None, **fields: object) -> Joining:
    """Check a join request of a fresh worker, with some fields changed."""
    return Joining.from_message(pb.JoinRequest.FromString(join_request(**fields)), config)


def test_models_larger_than_the_server_accepts_are_refused_with_the_settings_name() -> None:
    exact = ServerConfig(max_parameters=SPACE.size)
    assert joining(exact).part.stop == SPACE.size
    message = (
        rf"has {SPACE.size} values .* accepts {SPACE.size - 1} \(ServerConfig.max_parameters\)"
    )
    with pytest.raises(TooLargeError, match=message):
        joining(ServerConfig(max_parameters=SPACE.size - 1))
    half = ServerConfig(max_parameters=(SPACE.size + 1) // 2)
    assert joining(half, num_shards=2).num_shards == 2  # the limit is of one server
    with pytest.raises(TooLargeError, match="the model has 17179869184 values on 1 server"):
        join_with([pb.TensorSpec(name="huge", shape=[2**34])])


def join_with(tensors: list[pb.TensorSpec], views: Iterable[pb.View] = ()) -> Joining:
    """Check a join request for another model."""
    request = pb.JoinRequest.FromString(join_request())
    del request.tensors[:]
    request.tensors.extend(tensors)
    request.views.extend(views)
    return Joining.from_message(request)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_what_a_join_offers_is_what_the_session_exchanges(num_shards: int) -> None:
    views = halves((0, 3), (3, 7))
    for member in range(2):
        for shard, limits in enumerate(SPACE.shard_ranges(num_shards)):
            asked = joining(views=views, member=member, num_shards=num_shards, shard=shard)
            expected = Part(views_from_message(SPACE, views)[member], *limits)
            assert asked.part == expected
            asked.part.prepare()
            prepared = set(vars(asked.part))
            assert {"segment_sizes", "coordinates", "tail_coordinates"} <= prepared


def test_the_cost_of_checking_a_join_does_not_grow_with_the_size_of_its_tensors() -> None:
    space = space_of([(2**15, 2**15)])
    columns = [View(space, (Slab(0, (0, i), (2**15, 2**14)),)) for i in (0, 2**14)]
    tracemalloc.start()
    try:
        asked = join_with(space_to_message(space), views_to_message(columns))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert asked.part.size == 2**29
    assert peak < 1_000_000  # the coordinates alone will take 4 GiB, once the model is agreed on


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
