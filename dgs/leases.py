"""When a session has been silent for too long.

Time is given, not read, and nothing is closed here: whoever holds the sessions looks at them now
and then, and closes those that are named.
"""

from __future__ import annotations

from collections.abc import Iterable

from dgs.errors import ConfigError

__all__ = ["Leases", "SessionKey"]

SessionKey = tuple[int, int, int]
"""Worker id, member and incarnation."""


class Leases:
    """Remember when each session was last seen to change.

    Args:
        lease_s: seconds without a change after which a session has expired; 0 for never.

    Raises:
        ConfigError: `lease_s` is negative or no number.

    Example:
        >>> leases = Leases(60.0)
        >>> leases.observe(0.0, [((1, 0, 7), "3 exchanges")])
        []
        >>> leases.observe(60.0, [((1, 0, 7), "3 exchanges"), ((2, 0, 9), "none yet")])
        [(1, 0, 7)]
    """

    def __init__(self, lease_s: float) -> None:
        """Begin with no session."""
        if not lease_s >= 0:
            raise ConfigError(f"lease_s={lease_s!r} is not valid: give seconds; 0 for never")
        self._lease_s = lease_s
        self._seen: dict[SessionKey, tuple[object, float]] = {}

    def observe(
        self, now_s: float, sessions: Iterable[tuple[SessionKey, object]]
    ) -> list[SessionKey]:
        """Look at all sessions there are, and return those that have expired.

        A session that is new, or whose mark has changed, counts as changed now. One that is not
        among `sessions` any more is forgotten. An expired one is named once and then forgotten; if
        it is there the next time, it is new.

        Args:
            now_s: a clock's reading; never goes back from one call to the next.
            sessions: key and mark of each, where the mark is anything that changes whenever the
                session exchanges.

        Returns:
            The keys of the expired sessions, in the order of `sessions`.
        """
        if self._lease_s == 0:
            return []
        seen: dict[SessionKey, tuple[object, float]] = {}
        expired: list[SessionKey] = []
        for key, mark in sessions:
            before, since_s = self._seen.get(key, (mark, now_s))
            if mark != before:
                since_s = now_s
            if now_s - since_s >= self._lease_s:
                expired.append(key)
            else:
                seen[key] = (mark, since_s)
        self._seen = seen
        return expired
