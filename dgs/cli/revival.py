"""Servers that `dgs launch` starts again, and the folders that their states are in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dgs.cli.console import note
from dgs.errors import ConfigError, ServerUnavailableError
from dgs.processes import LocalServer
from dgs.storage.repair import holds_state

__all__ = ["SERVER_RESTARTS", "Revival", "choose_folders"]

SERVER_RESTARTS = 10
"""How often in a row a server is started again, unless the user says otherwise."""

STEADY_S = 60.0
"""A server that has served for so long begins a new row."""

FAILED_STARTS = 3
"""Starts in a row, each ending before the server listens, after which it is given up: what keeps it
from starting will not go away by itself."""

_SHARD = re.compile(r"shard-(0|[1-9]\d*)")


def choose_folders(parent: Path, count: int | None) -> tuple[list[Path], bool]:
    """Return one state directory per server, and whether there is no state in them yet.

    Args:
        parent: the folder that they are in.
        count: number of servers; None for as many as there are states, or 1.

    Raises:
        ConfigError: the folder is of another number of servers, or not one of `dgs launch`.
    """
    try:
        children = list(parent.iterdir()) if parent.exists() else []
        found = sorted(number for child in children if (number := _shard_in(child)) is not None)
    except OSError as error:
        raise ConfigError(f"cannot use {parent} for states: {error.strerror or error}") from error
    if holds_state(child.name for child in children):
        raise ConfigError(
            f"{parent} holds the state of one 'dgs server --state-dir {parent}'; name another "
            f"folder, or move its files to {parent / 'shard-0'}"
        )
    count = count or len(found) or 1
    if found and found != list(range(count)):
        states = ", ".join(f"shard-{i}" for i in found)
        raise ConfigError(
            f"{parent} holds the states of {len(found)} servers ({states}), expected those of "
            f"{count} (shard-0 to shard-{count - 1}): launch as many servers as before, put back "
            "what is missing, or name another folder with --state-dir"
        )
    return [parent / f"shard-{i}" for i in range(count)], not found


def _shard_in(folder: Path) -> int | None:
    """Return the number of the shard whose state a folder holds, if it does."""
    match = _SHARD.fullmatch(folder.name)
    if match is None or not holds_state(child.name for child in folder.iterdir()):
        return None
    return int(match[1])


class Revival:
    """Start servers again that have ended, on their addresses; each recovers its state.

    Args:
        servers: the servers.
        most: how often in a row each is started again.
    """

    def __init__(self, servers: Sequence[LocalServer], most: int) -> None:
        """Nothing has ended yet."""
        self._servers = {server.label: server for server in servers}
        self._most = most
        self._restarts = dict.fromkeys(self._servers, 0)
        self._failed = dict.fromkeys(self._servers, 0)

    def revive(self, label: str, how: str) -> None:
        """Start a server again.

        Args:
            label: of the server.
            how: how it ended, in words.

        Raises:
            ServerUnavailableError: it does not start, or was started too often.
        """
        server = self._servers[label]
        served_s = server.served_s
        if served_s is None:
            self._failed[label] += 1
        else:
            self._failed[label] = 0
            if served_s >= STEADY_S:
                self._restarts[label] = 0
        if self._failed[label] >= FAILED_STARTS:
            self._give_up(server, how, f"before it listened, {FAILED_STARTS} times in a row")
        if self._restarts[label] >= self._most:
            self._give_up(server, how, f"after {self._most} restarts in a row")
        self._restarts[label] += 1
        note(
            f"{label} {how}; it is started again on {server.address} (restart "
            f"{self._restarts[label]} of {self._most})"
        )
        server.start()

    def _give_up(self, server: LocalServer, how: str, when: str) -> None:
        raise ServerUnavailableError(f"{server.label} {how} {when}; its output:\n{server.output}")
