"""Worlds of ranks, each started when the first test needs it and kept for all others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.worlds import World

IMPORTS = ("torch._dynamo",)
"""What the first optimizer and the first checkpoint of a process import."""


@pytest.fixture(scope="session")
def world2() -> Iterator[World]:
    with World(2, restarts=True, imports=IMPORTS) as world:
        yield world


@pytest.fixture(scope="session")
def world4() -> Iterator[World]:
    with World(4, restarts=True, imports=IMPORTS) as world:
        yield world


@pytest.fixture(scope="session")
def world8() -> Iterator[World]:
    with World(8, restarts=True, imports=IMPORTS) as world:
        yield world
