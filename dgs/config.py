"""Settings: frozen, checked when they are made, each explained where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from dgs.errors import ConfigError

__all__ = ["RetryConfig", "Rule", "Selection", "ServerConfig", "Values", "WorkerConfig"]

Rule = Literal["samomentum", "residual", "dgc", "none"]
Selection = Literal["tracked", "exact"]
Values = Literal["float32", "bfloat16", "int8", "int4", "int2", "sign"]
Where = Literal["base", "compensated"]
Buffers = Literal["average", "local"]


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r} is not valid: {wanted}")


def _require_choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    _require(value in allowed, name, value, "choose one of " + ", ".join(map(repr, allowed)))


def _require_fraction(name: str, value: float) -> None:
    ok = isinstance(value, int | float) and math.isfinite(value) and 0.0 < value <= 1.0
    _require(ok, name, value, "give a fraction in (0, 1], such as 0.01 for 1 %")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """How long, and how patiently, a worker tries to reach a server."""

    connect_budget_s: float = 30.0
    """Seconds to keep trying to join before giving up."""

    budget_s: float = 300.0
    """Seconds to keep retrying one exchange before giving up; covers a server's restart."""

    attempt_s: float = 120.0
    """Seconds that one attempt may take; the last attempt is cut to what the budget leaves."""

    first_wait_s: float = 0.1
    """Seconds before the first retry; each further wait doubles."""

    longest_wait_s: float = 5.0
    """Upper bound of the wait between two attempts, in seconds."""

    def __post_init__(self) -> None:
        """Check every field."""
        for f in fields(self):
            value = getattr(self, f.name)
            ok = isinstance(value, int | float) and math.isfinite(value) and value > 0
            _require(ok, f.name, value, "give a positive number of seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """What one worker does between two exchanges, and what it sends.

    Example:
        >>> WorkerConfig(momentum=0.9, density=0.01).rule
        'samomentum'
    """

    rule: Rule = "samomentum"
    """Momentum rule: what becomes of velocity that was sent, and of velocity that was not."""

    momentum: float = 0.7
    """Share of a sent velocity that stays, in [0, 1); the paper's m. Rules without momentum
    (``residual``, ``none``) do not use it."""

    density: float = 0.01
    """Fraction of each tensor sent per exchange, in (0, 1]; the paper's R is 100 * density."""

    download_density: float = 0.01
    """Fraction of each tensor that a reply may hold, in (0, 1]; 1 returns everything that differs
    (no secondary compression)."""

    selection: Selection = "tracked"
    """``exact``: the largest entries of each tensor, no exceptions; ``tracked``: a threshold
    carried from step to step."""

    dense_below: int = 32
    """Under ``tracked``, tensors with fewer entries than this are sent whole."""

    values: Values = "float32"
    """How values are coded on the wire, both ways; rounding errors are kept, never lost."""

    view: Where = "base"
    """Where gradients are computed: ``base``, the worker's replica of the model (the paper), or
    ``compensated``, the replica plus the worker's own progress that it has not sent yet."""

    local_steps: int = 1
    """Steps of the inner optimizer between two exchanges (H)."""

    overlap: bool = False
    """Whether the next steps run while an exchange is in flight; costs one more copy of the
    model."""

    buffers: Buffers = "average"
    """Float buffers handed over as `named_buffers`: averaged by the server, or kept ``local``."""

    worker: str = ""
    """Name of this worker, unique in the run; empty: ``DGS_WORKER``, or a random name."""

    retry: RetryConfig = field(default_factory=RetryConfig)
    """How long a worker waits for its server."""

    def __post_init__(self) -> None:
        """Check every field and their combination."""
        _require_choice("rule", self.rule, Rule)
        _require_choice("selection", self.selection, Selection)
        _require_choice("values", self.values, Values)
        _require_choice("view", self.view, Where)
        _require_choice("buffers", self.buffers, Buffers)
        _require_fraction("density", self.density)
        _require_fraction("download_density", self.download_density)
        m = self.momentum
        ok = isinstance(m, int | float) and math.isfinite(m) and 0.0 <= m < 1.0
        _require(ok, "momentum", m, "give a number in [0, 1), such as 0.7")
        h = self.local_steps
        _require(isinstance(h, int) and h >= 1, "local_steps", h, "give a whole number >= 1")
        d = self.dense_below
        _require(isinstance(d, int) and d >= 0, "dense_below", d, "give a whole number >= 0")
        _require(isinstance(self.worker, str), "worker", self.worker, "give a string")
        _require(len(self.worker) <= 128, "worker", self.worker, "give at most 128 characters")
        if self.rule == "none" and (self.density < 1.0 or self.values != "float32"):
            raise ConfigError(
                "rule='none' keeps nothing back, so it needs density=1.0 and values='float32' "
                f"(got density={self.density}, values={self.values!r}); "
                "use rule='residual' to send less without losing what is not sent"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What one server shard does besides exchanging."""

    hash_interval: int = 64
    """Every how many replies of a session carry a hash of its record, for the worker to compare
    with its base; 0 for never."""

    max_workers: int = 1024
    """Sessions admitted at a time; each costs 4 bytes per parameter of memory."""

    def __post_init__(self) -> None:
        """Check every field."""
        n = self.hash_interval
        _require(isinstance(n, int) and n >= 0, "hash_interval", n, "give a whole number >= 0")
        w = self.max_workers
        _require(isinstance(w, int) and w >= 1, "max_workers", w, "give a whole number >= 1")
