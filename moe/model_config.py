"""Settings of a decoder-only transformer: frozen, checked when made, each explained in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe.checks import as_floats, require, require_choice, require_count, require_number
from moe.config import MoeConfig

__all__ = ["AttentionConfig", "FeedForwardConfig", "ModelConfig", "RopeConfig", "RopeKind"]

RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: dimension pair i of a head turns by ``position * theta**(-2i / width)``.

    Example:
        >>> RopeConfig(500000.0, "llama3", factor=8.0, original_positions=8192).low_frequency
        1.0
    """

    theta: float = 10000.0
    """Base of the frequencies."""

    kind: RopeKind = "default"
    """How frequencies are stretched: not at all; all by the factor (``linear``); or, as in Llama 3,
    the slow ones by the factor, the fast ones not, those between partly."""

    factor: float = 1.0
    """By how much; 1 for ``default``."""

    low_frequency: float = 1.0
    """``llama3``: stretched fully is what turns fewer times over the original context."""

    high_frequency: float = 4.0
    """``llama3``: not stretched is what turns more often over it."""

    original_positions: int = 8192
    """``llama3``: length of the context before it was stretched."""

    def __post_init__(self) -> None:
        """Check every field."""
        require_choice("kind", self.kind, RopeKind)
        for name in ("theta", "factor", "low_frequency"):
            require_number(name, getattr(self, name), above=0)
        require_number("high_frequency", self.high_frequency, above=self.low_frequency)
        require_count("original_positions", self.original_positions)
        stretched = self.kind != "default" or self.factor == 1
        require(stretched, "factor", self.factor, "kind 'default' stretches nothing; give 1")
        as_floats(self, "theta", "factor", "low_frequency", "high_frequency")


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Causal attention in which groups of query heads share a key and a value head.

    Example:
        >>> AttentionConfig(heads=32, kv_heads=8, head_dim=128).window is None
        True
    """

    heads: int
    """Query heads, over all ranks."""

    kv_heads: int
    """Key and value heads, over all ranks; divides `heads`."""

    head_dim: int
    """Width of a head; even."""

    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary embedding of queries and keys."""

    qkv_bias: bool = False
    """Whether the projections into queries, keys and values have a bias."""

    qk_norm: bool = False
    """Whether each head's query and key are normalised before they are rotated."""

    window: int | None = None
    """How many tokens a token sees at most, itself included; None: all before it."""

    window_from: int = 0
    """First layer with the window; those before it see everything."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("heads", "kv_heads", "head_dim"):
            require_count(name, getattr(self, name))
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "give an even width")
        divides = self.heads % self.kv_heads == 0
        require(divides, "kv_heads", self.kv_heads, f"give a divisor of heads={self.heads}")
        require(isinstance(self.rope, RopeConfig), "rope", self.rope, "give a RopeConfig")
        if self.window is not None:
            require_count("window", self.window)
        require_count("window_from", self.window_from, least=0)

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens one sees in a layer, or None."""
        return self.window if layer >= self.window_from else None


@dataclass(frozen=True, slots=True)
class FeedForwardConfig:
    """What stands after attention: a dense SwiGLU, or a mixture of experts in some layers or all.

    Example:
        >>> FeedForwardConfig(inner=11008).moe is None
        True
    """

    inner: int = 0
    """Inner width of a dense layer; 0 if no layer is dense."""

    moe: MoeConfig | None = None
    """The mixture; None: every layer is dense."""

    moe_layers: tuple[int, ...] | None = None
    """Which layers are mixtures, counted from 0, ascending; None: all, if there is a mixture."""

    def __post_init__(self) -> None:
        """Check every field."""
        require_count("inner", self.inner, least=0)
        kind = self.moe is None or isinstance(self.moe, MoeConfig)
        require(kind, "moe", self.moe, "give a MoeConfig, or None for dense layers")
        if self.moe_layers is None:
            return
        layers = self.moe_layers
        ascending = isinstance(layers, tuple) and list(layers) == sorted(set(layers))
        require(ascending, "moe_layers", layers, "give a tuple of layers, ascending")
        require(self.moe is not None, "moe_layers", layers, "there is no mixture; give moe")

    def moe_of(self, layer: int) -> MoeConfig | None:
        """Return the mixture of a layer, or None for a dense one."""
        return self.moe if self.moe_layers is None or layer in self.moe_layers else None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with norms before attention and before the feed-forward.

    Example:
        >>> tiny = ModelConfig(
        ...     100, 32, 2, AttentionConfig(4, 2, head_dim=8), FeedForwardConfig(inner=64)
        ... )
        >>> tiny.tied, tiny.eps
        (False, 1e-06)
    """

    vocabulary: int
    """How many tokens there are."""

    hidden: int
    """Width of a token, D."""

    num_layers: int
    """How many layers there are, over all pipeline stages."""

    attention: AttentionConfig
    """How tokens see each other."""

    feed_forward: FeedForwardConfig
    """What becomes of each token on its own."""

    eps: float = 1e-6
    """Added to the mean square in every norm."""

    tied: bool = False
    """Whether the output shares the embedding's weight."""

    max_positions: int = 4096
    """Length of context that the model was made for; told, not enforced."""

    def __post_init__(self) -> None:
        """Check every field, and that the parts fit each other."""
        for name in ("vocabulary", "hidden", "num_layers", "max_positions"):
            require_count(name, getattr(self, name))
        for name, kind in (("attention", AttentionConfig), ("feed_forward", FeedForwardConfig)):
            value = getattr(self, name)
            require(isinstance(value, kind), name, value, f"give a {kind.__name__}")
        require_number("eps", self.eps, above=0)
        as_floats(self, "eps")
        self._check_layers()

    def _check_layers(self) -> None:
        moe, named = self.feed_forward.moe, self.feed_forward.moe_layers or ()
        there = all(0 <= layer < self.num_layers for layer in named)
        require(there, "moe_layers", named, f"layers are 0 to {self.num_layers - 1}")
        dense = [n for n in range(self.num_layers) if self.feed_forward.moe_of(n) is None]
        require(
            self.feed_forward.inner > 0 or not dense,
            "inner",
            self.feed_forward.inner,
            f"layers such as {dense[:1]} are dense; give their inner width",
        )
        if moe is not None:
            width = moe.experts.hidden
            require(width == self.hidden, "experts.hidden", width, f"tokens have {self.hidden}")
