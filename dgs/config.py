"""Settings: frozen, checked when they are made, each explained where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Literal, get_args

from dgs.errors import ConfigError
from dgs.security import ClientSecurity

__all__ = [
    "SLOWEST_BYTES_PER_S",
    "RetryConfig",
    "Rule",
    "Selection",
    "ServerConfig",
    "StorageConfig",
    "Values",
    "WorkerConfig",
    "is_worker_name",
]

Rule = Literal["samomentum", "residual", "dgc", "none"]
Selection = Literal["tracked", "exact"]
Values = Literal["float32", "bfloat16", "int8", "int4", "int2", "sign"]
Where = Literal["base", "compensated"]
Buffers = Literal["average", "local"]
Keepalive = Literal["steady", "fast"]


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r} is not valid: {wanted}")


def _require_choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    _require(value in allowed, name, value, "choose one of " + ", ".join(map(repr, allowed)))


def _settle_real(config: object, name: str, ok: Callable[[float], bool], wanted: str) -> None:
    """Check a field that is a number, and make it a plain float; True and False are none."""
    value = getattr(config, name)
    good = isinstance(value, Real) and not isinstance(value, bool)
    _require(good and ok(value), name, value, wanted)
    object.__setattr__(config, name, float(value))


def _settle_fraction(config: object, name: str) -> None:
    wanted = "give a fraction in (0, 1], such as 0.01 for 1 %"
    _settle_real(config, name, lambda value: 0.0 < value <= 1.0, wanted)


def _settle_whole(config: object, name: str, least: int, most: int | None = None) -> None:
    """Check a field that is a whole number, and make it a plain int; True and False are none."""
    value = getattr(config, name)
    good = isinstance(value, Integral) and not isinstance(value, bool)
    good = good and least <= value and (most is None or value <= most)
    upper = "" if most is None else f" and <= {most}"
    _require(good, name, value, f"give a whole number >= {least}{upper}")
    object.__setattr__(config, name, int(value))


def is_worker_name(name: str) -> bool:
    r"""Tell whether a worker may have this name: terminals show it, and messages carry it.

    Example:
        >>> is_worker_name("worker-0"), is_worker_name("\x1b[2J"), is_worker_name("")
        (True, False, False)
    """
    return 0 < len(name) <= 128 and name.isprintable()


SLOWEST_BYTES_PER_S = 50e3
"""Rate, in each direction, of a link that is still waited for: 400 kbit/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """How long, and how patiently, a worker tries to reach a server.

    Budgets and attempts are longer by what a message's bytes take at `slowest_bytes_per_s`.
    """

    connect_budget_s: float = 30.0
    """Seconds to keep trying to join before giving up."""

    budget_s: float = 300.0
    """Seconds to keep retrying one exchange before giving up; covers a server's restart."""

    attempt_s: float = 120.0
    """Seconds that one attempt may take; the last attempt is cut to what the budget leaves."""

    first_wait_s: float = 0.1
    """Seconds before the first retry; each further wait doubles."""

    longest_wait_s: float = 2.0
    """Upper bound of the wait between two attempts, in seconds."""

    slowest_bytes_per_s: float = SLOWEST_BYTES_PER_S
    """Rate of a link that is still waited for, in each direction."""

    keepalive: Keepalive = "steady"
    """How soon a silently cut link is noticed while a call waits: ``steady``, within 60 s, or
    ``fast``, within 15 s, for links of 1 MB/s and more (on slower ones it may cut an upload)."""

    def __post_init__(self) -> None:
        """Check every field."""
        _require_choice("keepalive", self.keepalive, Keepalive)
        wanted = "give a positive number of seconds, at most 1e9"
        for f in fields(self):
            if f.name.endswith("_s") and f.name != "slowest_bytes_per_s":
                _settle_real(self, f.name, lambda v: 0 < v <= 1e9, wanted)
        wanted = "give a positive number of bytes a second, such as 50e3"
        _settle_real(self, "slowest_bytes_per_s", lambda v: v > 0, wanted)

    def room_s(self, message_bytes: int) -> float:
        """Return the seconds that so many bytes, both ways together, take at the slowest rate.

        Example:
            >>> RetryConfig(slowest_bytes_per_s=1e6).room_s(500_000)
            0.5
        """
        return message_bytes / self.slowest_bytes_per_s


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
    """Under ``tracked``, tensors with fewer entries than this are sent whole; below 2**32."""

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
    """Name of this worker, unique in the run, at most 128 printable characters; empty:
    ``DGS_WORKER``, or a random name."""

    checkpoint: str | PathLike[str] = ""
    """File that the optimizer's whole state is kept in, and loaded from at the start if it is
    there; or a folder (there already, or ending with a slash), for a file with the worker's name.
    It is written when the optimizer is closed, by `save`, and as `checkpoint_every` says."""

    checkpoint_every: int = 0
    """Exchanges from one automatic checkpoint to the next; 0 for none. It is written before the
    update is sent, so with 1 a worker that is killed at any moment goes on bit for bit; with more,
    one that is killed later loses its velocity and what it had not sent. Each writes about three
    copies of the model, and the inner optimizer's state."""

    retry: RetryConfig = field(default_factory=RetryConfig)
    """How long a worker waits for its server."""

    security: ClientSecurity | None = None
    """Certificates and token to reach servers with; None: as ``DGS_TLS_CA``, ``DGS_TLS_CERT``,
    ``DGS_TLS_KEY`` and ``DGS_TOKEN_FILE`` say."""

    def __post_init__(self) -> None:
        """Check every field and their combination."""
        _require_choice("rule", self.rule, Rule)
        _require_choice("selection", self.selection, Selection)
        _require_choice("values", self.values, Values)
        _require_choice("view", self.view, Where)
        _require_choice("buffers", self.buffers, Buffers)
        _settle_fraction(self, "density")
        _settle_fraction(self, "download_density")
        wanted = "give a number in [0, 1), such as 0.7"
        _settle_real(self, "momentum", lambda value: 0.0 <= value < 1.0, wanted)
        _settle_whole(self, "local_steps", 1)
        _settle_whole(self, "dense_below", 0, 0xFFFFFFFF)
        w = self.worker
        _require(isinstance(w, str), "worker", w, "give a string")
        _require(len(w) <= 128, "worker", w, "give at most 128 characters")
        _require(w == "" or is_worker_name(w), "worker", w, "give printable characters only")
        _require(isinstance(self.overlap, bool), "overlap", self.overlap, "give True or False")
        place = self.checkpoint
        _require(isinstance(place, str | PathLike), "checkpoint", place, "give a path")
        _settle_whole(self, "checkpoint_every", 0)
        every, wanted = self.checkpoint_every, "give checkpoint=PATH as well, to write to"
        _require(not every or bool(fspath(place)), "checkpoint_every", every, wanted)
        _require(isinstance(self.retry, RetryConfig), "retry", self.retry, "give a RetryConfig")
        shown, wanted = self.security, "give a ClientSecurity"
        _require(shown is None or isinstance(shown, ClientSecurity), "security", shown, wanted)
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

    max_parameters: int = 1 << 33
    """Values, buffers included, that a worker's model may have per server it is split over. Each
    costs 4 bytes, and as much per session."""

    lease_s: float = 3600.0
    """Seconds without an exchange after which a session is closed and its memory freed; its worker
    joins again by itself if it comes back. 0 for never."""

    max_in_flight_bytes: int = 1 << 30
    """Bytes of requests that may be arriving or waiting at a time; more are put off."""

    max_reply_bytes: int = 1 << 30
    """Bytes of replies that are kept for repeated requests, the latest one whatever its size. The
    oldest give way; a worker that repeats one of these joins again."""

    def __post_init__(self) -> None:
        """Check every field."""
        _settle_whole(self, "hash_interval", 0)
        _settle_whole(self, "max_workers", 1)
        _settle_whole(self, "max_parameters", 1)
        _settle_whole(self, "max_in_flight_bytes", 1 << 20)
        _settle_whole(self, "max_reply_bytes", 0)
        wanted = "give seconds, at most 1e9; 0 for never"
        _settle_real(self, "lease_s", lambda v: 0 <= v <= 1e9, wanted)


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """How a server with a state directory keeps it."""

    snapshot_interval_s: float = 300.0
    """Seconds between two snapshots, where anything has changed."""

    snapshot_log_bytes: int = 256 << 20
    """Length of the log at which a snapshot is made early: it bounds what a restart replays."""

    snapshot_log_records: int = 5_000
    """Requests in the log at which a snapshot is made early; each takes about a millisecond to
    carry out again on an idle core, and more in large models."""

    def __post_init__(self) -> None:
        """Check every field."""
        wanted = "give a positive number of seconds, at most 1e9"
        _settle_real(self, "snapshot_interval_s", lambda v: 0 < v <= 1e9, wanted)
        _settle_whole(self, "snapshot_log_bytes", 1 << 20)
        _settle_whole(self, "snapshot_log_records", 1)
