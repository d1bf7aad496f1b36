"""Settings of an upcycling: frozen, checked when made, each explained in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from moe.errors import UpcycleError

__all__ = [
    "DropScope",
    "Method",
    "RouterInit",
    "Routing",
    "Scaling",
    "UpcycleConfig",
    "parse_layers",
]

Method = Literal["copy", "virtual-group", "drop", "noise", "branch-train-mix"]
Scaling = Literal["exact", "paper", "down", "none", "calibrated"]
Routing = Literal["topk-softmax", "softmax-topk"]
RouterInit = Literal["normal", "uniform", "centroid"]
DropScope = Literal["neuron", "matrix"]

SHARDING = ("virtual-group", "noise")
"""Methods whose experts may be narrower than the dense FFN."""


@dataclass(frozen=True, slots=True)
class UpcycleConfig:
    """What becomes of each dense FFN.

    A dense FFN of inner width F is cut along F into G = `granularity` shards. The first
    `shared_experts` of them become the shared expert; each of the other R is replicated into
    ``experts / R`` routed experts. Expert e holds the routed shard e mod R of replica e // R.

    Example:
        >>> config = UpcycleConfig(experts=64, top_k=8, method="virtual-group", granularity=8)
        >>> config.replicas, config.routed_shards
        (8, 8)
    """

    experts: int
    """How many routed experts a layer gets, replicas times shards."""

    top_k: int
    """How many of them each token goes to; a multiple of the routed shards."""

    granularity: int = 1
    """In how many shards each dense FFN is cut, G; an expert is one G-th as wide as the FFN."""

    method: Method = "copy"
    """``copy``: whole FFNs; ``virtual-group``: shards under tied router rows; ``drop``: copies of
    which a fraction is drawn anew; ``noise``: shards with noise on top; ``branch-train-mix``: the
    FFNs of several dense models, all else averaged."""

    scaling: Scaling = "exact"
    """How weights make up for the router's weights; `moe.upcycling.scaling` has the formulas."""

    routing: Routing = "topk-softmax"
    """Whether a token's weights are the softmax over its choices, or that over all experts."""

    shared_experts: int = 0
    """How many of the shards go to the shared expert, which every token passes through."""

    layers: tuple[int, ...] | None = None
    """Which layers become mixtures, counted from 0; None: all."""

    router_init: RouterInit = "normal"
    """Router rows: normal or uniform of mean 0 and `router_std`, or the centroids of the FFN's
    inputs over the calibration text, as long as such rows are in the mean."""

    router_std: float = 0.02
    """Standard deviation of a router's weights."""

    fraction: float = 0.5
    """``drop``: which part of an expert's neurons is drawn anew, in (0, 1]."""

    drop_scope: DropScope = "neuron"
    """``drop``: the same neurons in all three matrices, or others in each matrix."""

    noise_scale: float = 0.01
    """``noise``: standard deviation of the noise, as a multiple of that of the matrix."""

    seed: int = 0
    """Decides everything that is drawn."""

    def __post_init__(self) -> None:
        """Check every field."""
        choices = (
            ("method", Method),
            ("scaling", Scaling),
            ("routing", Routing),
            ("router_init", RouterInit),
            ("drop_scope", DropScope),
        )
        for name, allowed in choices:
            _require_choice(name, getattr(self, name), get_args(allowed))
        for name, least in (("experts", 1), ("top_k", 1), ("granularity", 1)):
            _require_count(name, getattr(self, name), least)
        _require_count("shared_experts", self.shared_experts, 0)
        _require_count("seed", self.seed, 0)
        _require_positive("router_std", self.router_std)
        _require_positive("noise_scale", self.noise_scale)
        _require_positive("fraction", self.fraction)
        if self.fraction > 1:
            raise UpcycleError(f"fraction={self.fraction} is above 1; give a part in (0, 1]")
        self._check_shards()
        self._check_top_k()

    @property
    def routed_shards(self) -> int:
        """How many different routed shards there are, R."""
        return self.granularity - self.shared_experts

    @property
    def replicas(self) -> int:
        """How often each routed shard is there, E."""
        return self.experts // self.routed_shards

    def _check_shards(self) -> None:
        if self.granularity > 1 and self.method not in SHARDING:
            raise UpcycleError(
                f"method {self.method!r} keeps FFNs whole, but granularity={self.granularity}; "
                "leave granularity out or use --method virtual-group"
            )
        if self.shared_experts >= self.granularity and self.shared_experts:
            raise UpcycleError(
                f"shared_experts={self.shared_experts} of {self.granularity} shards leave none to "
                "route; raise granularity above it (methods virtual-group and noise)"
            )
        if self.experts % self.routed_shards:
            raise UpcycleError(
                f"experts={self.experts} is not a multiple of the {self.routed_shards} routed "
                "shards, so that some shards would have more replicas than others"
            )

    def _check_top_k(self) -> None:
        if self.top_k > self.experts:
            raise UpcycleError(f"top_k={self.top_k} is above experts={self.experts}")
        if self.top_k % self.routed_shards:
            raise UpcycleError(
                f"top_k={self.top_k} is not a multiple of the {self.routed_shards} routed shards: "
                "a token would get some shards of the dense FFN more often than others, and the "
                f"function would be lost; give a top_k out of {self.routed_shards}, "
                f"{2 * self.routed_shards}, ..."
            )


def parse_layers(text: str) -> tuple[int, ...] | None:
    """Return the layers that a text such as ``all`` or ``0-3,8`` names, sorted.

    Raises:
        UpcycleError: the text is of another form.

    Example:
        >>> parse_layers("0-2,5"), parse_layers("all")
        ((0, 1, 2, 5), None)
    """
    if text == "all":
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise UpcycleError(f"layers {text!r} is not valid; give all, or a list such as 0-3,8")
        found.update(range(int(first), int(last if dash else first) + 1))
    if not found:
        raise UpcycleError(f"layers {text!r} names no layer; give all, or a list such as 0-3,8")
    return tuple(sorted(found))


def _require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UpcycleError(f"{name}={value!r} is not valid: choose one of {', '.join(allowed)}")


def _require_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UpcycleError(
            f"{name}={value!r} is not valid: give a whole number of at least {least}"
        )


def _require_positive(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UpcycleError(f"{name}={value!r} is not valid: give a finite number above 0")
