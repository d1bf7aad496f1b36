"""Checks that settings make of themselves when they are made."""

from __future__ import annotations

import math
from typing import get_args

from moe.errors import MoeError

__all__ = [
    "ConfigError",
    "as_floats",
    "require",
    "require_choice",
    "require_count",
    "require_number",
]


class ConfigError(MoeError, ValueError):
    """A setting is out of range or contradicts another one; nothing was built."""


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Refuse a setting unless a condition holds.

    Args:
        condition: what has to hold.
        name: of the setting.
        value: that it has.
        wanted: the remedy.

    Raises:
        ConfigError: it does not hold.
    """
    if not condition:
        raise ConfigError(f"{name}={value!r} is not valid: {wanted}")


def require_choice(name: str, value: object, choices: object) -> None:
    """Refuse a setting that is none of the choices of a `Literal`."""
    allowed = get_args(choices)
    require(value in allowed, name, value, "choose one of " + ", ".join(map(repr, allowed)))


def require_count(name: str, value: object, least: int = 1) -> None:
    """Refuse a setting that is not a whole number of at least `least`."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, name, value, f"give a whole number of at least {least}")


def require_number(name: str, value: float, *, above: float | None = None) -> None:
    """Refuse a setting that is not a finite number above a bound, or, without one, negative."""
    ok = isinstance(value, int | float) and math.isfinite(value)
    if above is None:
        require(ok and value >= 0, name, value, "give a finite number that is not negative")
    else:
        require(ok and value > above, name, value, f"give a finite number above {above:g}")


def as_floats(settings: object, *names: str) -> None:
    """Replace numbers by plain floats, so that equal settings also look the same."""
    for name in names:
        object.__setattr__(settings, name, float(getattr(settings, name)))
