"""What a conversion says about its result: sizes, how much of the function is left, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe.upcycling.config import UpcycleConfig
from moe.upcycling.plan import Plan
from moe.upcycling.source import DenseCheckpoint

__all__ = ["as_text", "make_report", "reasons_not_exact", "sizes"]

EXACT = 1e-4
"""Relative logit error up to which float32 weights count as function-preserving."""

EXACT_IN_HALF = 3e-2
"""The same where scaled weights were rounded to half precision."""


def sizes(plan: Plan, source: DenseCheckpoint) -> dict[str, Any]:
    """Count parameters, and the matrix multiplications of a token (attention scores left out).

    Args:
        plan: of the result.
        source: the dense checkpoint.
    """
    config = plan.config
    routed = sum(_count(p.shape) for p in plan.pieces if p.kind == "expert")
    total = sum(_count(p.shape) for p in plan.pieces)
    idle = routed * (config.experts - config.top_k) // config.experts
    dense_total = sum(_count(s.shape) for s in source.tensors.values())
    # a tied embedding multiplies once, as the output; one of its own is only looked up
    table = 0 if source.config.tied else source.config.hidden * source.config.fields["vocab_size"]
    vectors = sum(_count(s.shape) for s in source.tensors.values() if len(s.shape) == 1)
    dense_flops = 2 * (dense_total - table - vectors)
    flops = 2 * (total - idle - table - vectors)
    return {
        "parameters": {"dense": dense_total, "total": total, "active": total - idle},
        "flops_per_token": {"dense": dense_flops, "mixture": flops},
        "flops_ratio": flops / dense_flops,
    }


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def reasons_not_exact(config: UpcycleConfig) -> list[str]:
    """Return why the result does not compute what the dense model does; empty where it does.

    Args:
        config: of the upcycling.

    Example:
        >>> reasons_not_exact(UpcycleConfig(experts=8, top_k=2))
        []
    """
    reasons = []
    if config.method not in ("copy", "virtual-group"):
        reasons.append(f"method {config.method} changes the experts' weights")
    if config.routing == "softmax-topk":
        reasons.append(
            "the weights of softmax-topk sum to a mass that varies from token to token, and one "
            "factor cannot make up for it"
        )
    elif config.routed_shards > 1 and config.scaling == "paper":
        reasons.append("the cube root also scales the gate, in which SwiGLU is not linear")
    elif config.routed_shards > 1 and config.scaling == "none":
        reasons.append(f"without scaling the experts give 1/{config.routed_shards} of the output")
    return reasons


def make_report(
    plan: Plan,
    source: DenseCheckpoint,
    measured: dict[str, Any] | None,
    skipped: str | None,
    masses: dict[int, float],
) -> dict[str, Any]:
    """Return the whole report as values of JSON.

    Args:
        plan: of the result.
        source: the dense checkpoint.
        measured: from `moe.upcycling.measure.compare`; None if nothing was measured.
        skipped: why not.
        masses: mean top-k mass by layer, where it was calibrated.
    """
    config = plan.config
    report: dict[str, Any] = {
        "format": plan.form,
        "settings": asdict(config),
        "mixture_layers": list(plan.layers),
        "bytes": plan.bytes,
        **sizes(plan, source),
        "calibrated_top_k_mass": {str(layer): mass for layer, mass in masses.items()} or None,
        "preservation": measured,
        "preservation_skipped": skipped,
    }
    narrow = any(s.dtype.itemsize < 4 for s in source.tensors.values())
    report["warnings"] = _warnings(config, measured, EXACT_IN_HALF if narrow else EXACT)
    return report


def _warnings(
    config: UpcycleConfig, measured: dict[str, Any] | None, tolerance: float
) -> list[str]:
    told = []
    reasons = "; ".join(reasons_not_exact(config))
    if measured is None:
        if reasons:
            told.append(
                f"the dense function is not preserved (how much was not measured): {reasons}"
            )
    elif measured["relative_logit_error"] > tolerance:
        told.append(
            "the dense function is not preserved: relative logit error "
            f"{measured['relative_logit_error']:.3g}, argmax agreement "
            f"{measured['argmax_agreement']:.1%}" + (f": {reasons}" if reasons else "")
        )
    if measured is not None:
        split = sum(r.get("tokens_with_split_groups_in_half", 0) for r in measured["routers"])
        if split:
            told.append(
                f"a router that decides in half precision splits groups of shards for {split} of "
                f"{measured['tokens'] * len(measured['routers'])} choices; compute router logits "
                "in float32, and let ties go to the expert of the lower number"
            )
    if config.top_k == 1 < config.experts and config.routing == "topk-softmax":
        told.append(
            "with top_k=1 and topk-softmax the only weight is always one, and the router gets no "
            "gradient from the model's loss; train with softmax-topk"
        )
    return told


def as_text(report: dict[str, Any]) -> str:
    """Return a report for people.

    Args:
        report: from `make_report`.
    """
    p = report["parameters"]
    lines = [
        f"{report['format']}: {p['total']:,} parameters, {p['active']:,} active "
        f"(dense {p['dense']:,}); {report['flops_ratio']:.2f} x the FLOPs of a token",
    ]
    if report["preservation"] is None:
        lines.append(f"function preservation not measured: {report['preservation_skipped']}")
    else:
        lines += _measured_lines(report["preservation"])
    lines += [f"warning: {line}" for line in report["warnings"]]
    return "\n".join(lines) + "\n"


def _measured_lines(m: dict[str, Any]) -> list[str]:
    ratios = [ratio for ratio in m["layer_output_ratio"] if ratio is not None]
    entropies = [r["entropy"] for r in m["routers"]]
    loads = [load for r in m["routers"] for load in r["load"]]
    return [
        f"on {m['tokens']} tokens: relative logit error {m['relative_logit_error']:.3g}, "
        f"argmax agreement {m['argmax_agreement']:.2%}",
        f"layer output ratio {min(ratios):.4f} to {max(ratios):.4f}; router entropy "
        f"{min(entropies):.3f} to {max(entropies):.3f} nats; load of an expert {min(loads):.2%} to "
        f"{max(loads):.2%}",
    ]
