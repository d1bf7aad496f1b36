"""Settings of a mixture-of-experts layer: frozen, checked when made, each explained in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe.checks import (
    ConfigError,
    as_floats,
    require,
    require_choice,
    require_count,
    require_number,
)
from moe.errors import RoutingError

__all__ = [
    "Activation",
    "By",
    "CapacityConfig",
    "ConfigError",
    "DropScope",
    "ExpertConfig",
    "LossConfig",
    "LossScope",
    "MoeConfig",
    "RouterConfig",
    "Score",
]

Score = Literal["softmax-topk", "topk-softmax", "sigmoid"]
DropScope = Literal["sub-sequence", "full-sequence"]
By = Literal["probability", "position"]
Activation = Literal["swiglu", "squared_relu"]
LossScope = Literal["micro-batch", "sequence", "global"]


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How a token's experts are chosen and weighted.

    With logits l, scores s and a bias b that only takes part in the choice:

    - ``softmax-topk``: s = softmax(l); the k largest s + b; weights s
    - ``topk-softmax``: s = softmax(l); the k largest s + b; weights softmax of the chosen l
    - ``sigmoid``: s = sigmoid(l); the k largest s + b; weights s

    Example:
        >>> RouterConfig(8, 2, renormalise=True).score
        'softmax-topk'
    """

    num_experts: int
    """How many routed experts the layer has, over all ranks."""

    top_k: int
    """How many of them every token goes to."""

    score: Score = "softmax-topk"
    """Score function, and whether the choice comes before or after it."""

    renormalise: bool = False
    """Whether a token's weights are divided by their sum. ``topk-softmax`` sums to one already."""

    groups: tuple[int, int] | None = None
    """``(count, kept)``: experts lie in `count` equal groups, of which a token keeps the `kept`
    best; a group is as good as the sum of its ``top_k // kept`` best scores. None: no groups."""

    scale: float = 1.0
    """Factor on all weights, after renormalisation."""

    expert_bias: bool = False
    """Whether the router has a bias per expert that balances the load without a loss; it changes
    what is chosen, never a weight. `Router.update_bias` moves it."""

    jitter: float = 0.0
    """Half width of the uniform factor around one on the router's input while training, in
    [0, 1); drawn from torch's default generator."""

    def __post_init__(self) -> None:
        """Check every field."""
        require_count("num_experts", self.num_experts)
        require_count("top_k", self.top_k)
        if self.top_k > self.num_experts:
            raise RoutingError(
                f"top_k={self.top_k} is above num_experts={self.num_experts}: a token cannot go to "
                f"more experts than there are; give top_k <= {self.num_experts}"
            )
        require_choice("score", self.score, Score)
        require_number("scale", self.scale, above=0)
        require_number("jitter", self.jitter)
        require(self.jitter < 1, "jitter", self.jitter, "give a half width in [0, 1)")
        as_floats(self, "scale", "jitter")
        self._check_weights()
        if self.groups is not None:
            require(
                isinstance(self.groups, tuple) and len(self.groups) == 2,
                "groups",
                self.groups,
                "give a pair (count, kept), or None for no groups",
            )
            self._check_groups(*self.groups)

    def _check_weights(self) -> None:
        after = self.score == "topk-softmax"
        require(
            not (after and self.renormalise),
            "renormalise",
            True,
            "topk-softmax weights sum to one already; leave renormalise out",
        )
        require(
            not (self.top_k == 1 < self.num_experts and (after or self.renormalise)),
            "top_k",
            1,
            "its only weight would always be one, and the router would never learn; use "
            "softmax-topk or sigmoid without renormalise",
        )

    def _check_groups(self, count: int, kept: int) -> None:
        require_count("groups[0]", count)
        require_count("groups[1]", kept)
        require(
            self.num_experts % count == 0,
            "groups",
            self.groups,
            f"{self.num_experts} experts do not divide into {count} groups",
        )
        size = self.num_experts // count
        require(
            kept <= count and self.top_k <= kept * size,
            "groups",
            self.groups,
            f"top_k={self.top_k} experts have to fit into {kept} of {count} groups of {size}",
        )


@dataclass(frozen=True, slots=True)
class CapacityConfig:
    """How many tokens an expert takes at most, and which it takes.

    Example:
        >>> CapacityConfig(1.25).by
        'probability'
    """

    factor: float
    """Capacity as a multiple of the mean load: an expert takes
    ``ceil(factor * tokens * top_k / num_experts)`` tokens."""

    scope: DropScope = "sub-sequence"
    """Whose tokens compete: those of one rank (no communication), or those of all ranks that hold
    a part of the same sequences (the same decision under every mapping)."""

    by: By = "probability"
    """Which tokens are kept: those of the largest weight, ties to the earlier one; or first come,
    first served."""

    pad: bool = False
    """Whether every expert gets exactly its capacity, filled up with zero rows (static shapes).
    With full-sequence dropping: the smaller of the capacity and the rank's own tokens."""

    def __post_init__(self) -> None:
        """Check every field."""
        require_number("factor", self.factor, above=0)
        as_floats(self, "factor")
        require_choice("scope", self.scope, DropScope)
        require_choice("by", self.by, By)


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """Size and kind of the experts, routed and shared.

    Example:
        >>> ExpertConfig(hidden=64, intermediate=128).activation
        'swiglu'
    """

    hidden: int
    """Width of a token, D."""

    intermediate: int
    """Inner width of one routed expert, F."""

    activation: Activation = "swiglu"
    """``swiglu``: silu(x W_gate) * (x W_up); ``squared_relu``: relu(x W_up)^2."""

    shared: int = 0
    """Inner width of the shared expert, which every token goes to; 0: there is none."""

    shared_gate: bool = False
    """Whether the shared expert's output is multiplied by sigmoid(x . gate)."""

    def __post_init__(self) -> None:
        """Check every field."""
        require_count("hidden", self.hidden)
        require_count("intermediate", self.intermediate)
        require_choice("activation", self.activation, Activation)
        require_count("shared", self.shared, least=0)
        require(
            self.shared > 0 or not self.shared_gate,
            "shared_gate",
            self.shared_gate,
            "there is no shared expert to gate; give shared a width",
        )

    @property
    def gated(self) -> bool:
        """Whether the first projection has a gate beside it."""
        return self.activation == "swiglu"


@dataclass(frozen=True, slots=True)
class LossConfig:
    """Auxiliary losses of the router; a coefficient of 0 leaves a loss out.

    Example:
        >>> LossConfig(balance=0.01).scope
        'micro-batch'
    """

    balance: float = 0.0
    """Coefficient of the load-balancing loss."""

    scope: LossScope = "micro-batch"
    """Over which tokens the load is balanced: those of one forward pass, those of each sequence
    on its own, or those of all ranks and all accumulation steps since the optimizer's last."""

    z: float = 0.0
    """Coefficient of the z-loss, the mean squared logsumexp of a token's logits."""

    def __post_init__(self) -> None:
        """Check every field."""
        require_number("balance", self.balance)
        require_choice("scope", self.scope, LossScope)
        require_number("z", self.z)
        as_floats(self, "balance", "z")


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """One mixture-of-experts layer.

    Example:
        >>> mixtral = MoeConfig(
        ...     RouterConfig(8, 2, renormalise=True), ExpertConfig(hidden=4096, intermediate=14336)
        ... )
        >>> mixtral.capacity is None  # dropless
        True
    """

    router: RouterConfig
    """How tokens choose experts."""

    experts: ExpertConfig
    """What an expert is."""

    losses: LossConfig = field(default_factory=LossConfig)
    """Auxiliary losses."""

    capacity: CapacityConfig | None = None
    """When tokens are dropped; None: never."""

    def __post_init__(self) -> None:
        """Check that every part is of its kind."""
        kinds = {"router": RouterConfig, "experts": ExpertConfig, "losses": LossConfig}
        for name, kind in kinds.items():
            value = getattr(self, name)
            require(isinstance(value, kind), name, value, f"give a {kind.__name__}")
        require(
            self.capacity is None or isinstance(self.capacity, CapacityConfig),
            "capacity",
            self.capacity,
            "give a CapacityConfig, or None for no dropping",
        )
