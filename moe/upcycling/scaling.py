"""How much weaker a mixture of replicated shards is than the dense FFN, and what makes up for it.

With N experts of which R are different (the routed shards), tied router rows and T choices that
are a multiple of R, a token whose T weights sum to the mass M gets

    MoE(x) = sum of T weighted shards = (M / R) * dense(x)

so that a gain of a = R / M restores the function. Weights renormalised over the choices have
M = 1. A softmax over all experts has M = T / N where the router is uniform, which gives the
a = N R / T of "Upcycling Large Language Models into Mixture of Experts" (equation 2, with R = G).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.config import Activation
from moe.errors import UpcycleError
from moe.upcycling.config import Routing, Scaling, UpcycleConfig

__all__ = ["Factors", "factors", "gain", "gain_from_mass", "gain_of"]


@dataclass(frozen=True, slots=True)
class Factors:
    """What the matrices of every routed expert are multiplied with."""

    gate: float
    """Of W_gate; without use where there is none."""

    up: float
    """Of W_up."""

    down: float
    """Of W_down."""


def gain(experts: int, top_k: int, routed_shards: int, routing: Routing) -> float:
    """Return the gain a that restores the dense function.

    - ``topk-softmax``: a = R. Exact for every router, since the weights of a token sum to one.
    - ``softmax-topk``: a = N R / T. Exact only where all experts get the same probability; with
      R = G this is E G^2 / T, equation 2 of the paper.

    Args:
        experts: N.
        top_k: T.
        routed_shards: R.
        routing: how weights are made from logits.

    Example:
        >>> gain(64, 8, 8, "softmax-topk"), gain(64, 8, 8, "topk-softmax")
        (64.0, 8.0)
    """
    if routing == "topk-softmax":
        return float(routed_shards)
    return experts * routed_shards / top_k


def gain_from_mass(mean_mass: float, routed_shards: int) -> float:
    """Return the gain a = R / mean(M) over calibration tokens; M is a token's sum of weights.

    Args:
        mean_mass: in (0, 1].
        routed_shards: R.

    Raises:
        UpcycleError: the mass is not in (0, 1].

    Example:
        >>> gain_from_mass(0.5, 8)
        16.0
    """
    if not 0 < mean_mass <= 1 + 1e-6:
        raise UpcycleError(f"a mean top-k mass of {mean_mass} is not in (0, 1]")
    return routed_shards / mean_mass


def gain_of(config: UpcycleConfig, mean_mass: float | None = None) -> float:
    """Return the gain that a configuration asks for.

    Args:
        config: of the upcycling.
        mean_mass: measured; needed by ``calibrated`` with ``softmax-topk``.

    Raises:
        UpcycleError: the mass is needed and missing.
    """
    if config.scaling == "calibrated" and config.routing == "softmax-topk":
        if mean_mass is None:
            raise UpcycleError("calibrated scaling needs the mean top-k mass of calibration tokens")
        return gain_from_mass(mean_mass, config.routed_shards)
    return gain(config.experts, config.top_k, config.routed_shards, config.routing)


def factors(scaling: Scaling, a: float, activation: Activation = "swiglu") -> Factors:
    """Spread a gain over the matrices of an expert.

    - ``exact``: SwiGLU, silu(x W_gate) * (x W_up) W_down, is linear in W_up and in W_down, and not
      in W_gate: gate 1, up and down sqrt(a). Squared ReLU, relu(x W_up)^2 W_down, is of degree 2
      and 1: the cube root of a on both.
    - ``calibrated``: as ``exact``, of an a that was measured (`gain_from_mass`).
    - ``paper``: the cube root of a on all matrices (section 2.3 of the paper). Exact for squared
      ReLU; not for SwiGLU, whose gate is not homogeneous.
    - ``down``: a on W_down alone. Exact; where a is a power of two, to the bit.
    - ``none``: 1.

    Args:
        scaling: how.
        a: gain, above 0.
        activation: of the experts.

    Example:
        >>> factors("exact", 16.0)
        Factors(gate=1.0, up=4.0, down=4.0)
    """
    if scaling == "none":
        return Factors(1.0, 1.0, 1.0)
    if scaling == "down":
        return Factors(1.0, 1.0, a)
    if scaling == "paper" or activation == "squared_relu":
        return Factors(*[a ** (1 / 3)] * 3)
    return Factors(1.0, a**0.5, a**0.5)
