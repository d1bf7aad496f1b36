"""What `dgs launch` does with the servers' model when the workers have ended, well or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgs.cli.console import note, words_for_bytes
from dgs.cli.pull import pull_to_file
from dgs.client import server_status
from dgs.config import RetryConfig
from dgs.errors import DgsError
from dgs.security import ClientSecurity
from dgs.transport.connect import connect

__all__ = [
    "nobody_joined",
    "not_saved",
    "save_final",
    "save_reached",
    "words_for_start",
    "words_for_updates",
]

FINAL_S = 60.0
"""Seconds for each call that fetches the final model."""

REACHED_S = 10.0
"""The same after a failure, where the servers may be gone as well."""

STATUS_S = 5.0


def words_for_updates(version: str) -> str:
    """Describe the versions of all shards.

    Args:
        version: of each shard, separated by commas.

    Example:
        >>> words_for_updates("7"), words_for_updates("7,9"), words_for_updates("1,1")
        ('7 updates', '7 to 9 updates', '1 update')
    """
    counts = sorted(int(v) for v in version.split(","))
    plural = "" if counts[-1] == 1 else "s"
    low = f"{counts[0]} to " if counts[0] != counts[-1] else ""
    return f"{low}{counts[-1]} update{plural}"


def save_final(addresses: Sequence[str], out: Path, security: ClientSecurity | None) -> None:
    """Write the model of a run that has ended well.

    Raises:
        DgsError: nothing was written; says why.
    """
    try:
        written = pull_to_file(addresses, out, timeout_s=FINAL_S, security=security)
    except DgsError as error:
        raise type(error)(f"nothing was saved to {out}: {error}") from error
    except KeyboardInterrupt:
        not_saved(out, "interrupted")
        raise
    note(_wrote(written))


def save_reached(addresses: Sequence[str], out: Path, security: ClientSecurity | None) -> None:
    """Write what the model has reached in a run that has failed, or say that nothing was saved."""
    try:
        written = pull_to_file(addresses, out, timeout_s=REACHED_S, security=security)
    except DgsError as error:
        not_saved(out, str(error))
    except KeyboardInterrupt:
        not_saved(out, "interrupted")
        raise
    else:
        note(f"{_wrote(written)}; what was reached, as the run did not end well")


def not_saved(out: Path, why: str) -> None:
    """Tell that there is no file."""
    note(f"nothing was saved to {out}: {why}")


def nobody_joined(address: str) -> bool:
    """Return whether no worker has ever joined a server of this machine that still answers."""
    [transport] = connect(address, RetryConfig(), security=ClientSecurity())
    try:
        status = server_status(transport, timeout_s=STATUS_S)
    except DgsError:
        return False
    finally:
        transport.close()
    return not status.initialiser and not status.workers


def words_for_start(addresses: Sequence[str]) -> str:
    """Say which version of the model servers of this machine have, before anybody trains it.

    Raises:
        ServerUnavailableError: a server does not answer.
    """
    transports = connect(list(addresses), RetryConfig(), security=ClientSecurity())
    try:
        statuses = [server_status(transport, timeout_s=STATUS_S) for transport in transports]
    finally:
        for transport in transports:
            transport.close()
    if not all(status.ready for status in statuses):
        return "without a model, as no worker had joined,"
    versions = sorted({status.version for status in statuses})
    return "from version " + " to ".join(str(v) for v in {versions[0]: 0, versions[-1]: 0})


def _wrote(written: Mapping[str, Any]) -> str:
    updates = words_for_updates(written["version"])
    return f"wrote {written['out']}: {words_for_bytes(written['bytes'])}, the model after {updates}"
