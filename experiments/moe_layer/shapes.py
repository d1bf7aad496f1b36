"""The two models' layers, and what they cost in multiplications."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe.config import ExpertConfig, MoeConfig, RouterConfig

__all__ = ["MIXTRAL", "QWEN2", "SHAPES", "Shape"]


@dataclass(frozen=True)
class Shape:
    """One mixture-of-experts layer and the tokens of one pass."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared: int = 0
    renormalise: bool = False

    @property
    def config(self) -> MoeConfig:
        """Return the layer's settings; dropless, no auxiliary loss."""
        return MoeConfig(
            RouterConfig(self.experts, self.top_k, renormalise=self.renormalise),
            ExpertConfig(
                self.hidden, self.intermediate, shared=self.shared, shared_gate=self.shared > 0
            ),
        )

    @property
    def rows(self) -> int:
        """Return how many rows the routed experts work on."""
        return self.tokens * self.top_k

    @property
    def expert_flop(self) -> int:
        """Return the operations of the routed experts, forwards and backwards."""
        return 3 * 6 * self.rows * self.hidden * self.intermediate

    @property
    def layer_flop(self) -> int:
        """Return the operations of the layer's matrix products, forwards and backwards."""
        shared = 6 * self.tokens * self.hidden * self.shared
        router = 2 * self.tokens * self.hidden * self.experts
        return self.expert_flop + 3 * (shared + router)

    def smaller(self, divisor: int, tokens: int) -> Shape:
        """Return the layer with all widths divided, and other tokens."""
        return replace(
            self,
            tokens=tokens,
            hidden=self.hidden // divisor,
            intermediate=self.intermediate // divisor,
            shared=self.shared // divisor,
        )


MIXTRAL = Shape("Mixtral-8x7B", 16384, 4096, 14336, 8, 2, renormalise=True)
QWEN2 = Shape("Qwen2-57B-A14B", 16384, 3584, 2560, 64, 8, shared=20480)
SHAPES = (MIXTRAL, QWEN2)
