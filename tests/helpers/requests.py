"""Requests of a real training, recorded, to be carried out again elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dgs.config import ServerConfig, WorkerConfig
from dgs.errors import DgsError
from dgs.server import ParameterServer
from dgs.transport.guard import Handler
from tests.helpers.sites import Site, gaussian, space_of


class Said(NamedTuple):
    """A request, and what the server made of it."""

    method: str
    request: bytes
    reply: bytes | DgsError


class Recorder:
    """A handler that keeps what passes through it."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.said: list[Said] = []

    def handle(self, method: str, request: bytes) -> bytes:
        try:
            reply = self.handler.handle(method, request)
        except DgsError as e:
            self.said.append(Said(method, request, e))
            raise
        self.said.append(Said(method, request, reply))
        return reply

    def max_request_bytes(self, method: str) -> int:
        return self.handler.max_request_bytes(method)


def answer(handler: Handler, said: Said) -> bytes | DgsError:
    """Carry out a recorded request."""
    try:
        return handler.handle(said.method, said.request)
    except DgsError as e:
        return e


def is_same(a: bytes | DgsError, b: bytes | DgsError) -> bool:
    """Tell whether two answers are the same bytes, or the same error."""
    if isinstance(a, DgsError) or isinstance(b, DgsError):
        return type(a) is type(b) and str(a) == str(b)
    return a == b


def record(
    seed: int = 0,
    rounds: int = 40,
    run: int = 9,
    handler: Handler | None = None,
    **settings: object,
) -> list[Said]:
    """Let three workers with buffers train, repeat, restart, leave and stumble; return it all."""
    rng = np.random.default_rng(seed)
    space = space_of([(7, 5), (), (64,), (0, 3), (3, 2, 4)], buffers=[(5,)])
    recorder = Recorder(handler or ParameterServer(ServerConfig(hash_interval=4), run=run))
    start = gaussian(rng, space.size)
    config = WorkerConfig(**{"density": 0.1, "download_density": 0.1, **settings})  # type: ignore[arg-type]
    sites = {n: Site(n, [recorder], config, start, space) for n in ("a", "b")}  # type: ignore[list-item]
    for turn in range(rounds):
        if turn == rounds // 4:
            sites["c"] = Site("c", [recorder], config, start, space)  # type: ignore[list-item]
        name = str(rng.choice(sorted(sites)))
        site = sites[name]
        frames = site.collect(gaussian(rng, space.num_parameters))
        site.worker.absorb(site.client.exchange(frames))
        if turn % 7 == 3:
            site.client.exchange(frames)  # a late copy
        if turn % 11 == 5:
            site.join(start)
        if turn == rounds // 2:
            site.client.rename(name + "-again")
            site.join(start)
    return recorder.said


def halves(said: list[Said], step: int) -> Iterator[tuple[list[Said], list[Said]]]:
    """Cut a record in two at several places."""
    for at in range(0, len(said), step):
        yield said[:at], said[at:]
