"""Reports as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from experiments.exchange_cost.figures import Report

__all__ = ["table"]


def table(report: Report) -> str:
    """Return a report as text.

    Args:
        report: by part, those that were measured.
    """
    writers: dict[str, Callable[[Report], Iterator[str]]] = {
        "paths": _paths,
        "index": _index,
        "loopback": _loopback,
        "memory": _memory,
        "warm-up": _warm_up,
        "scale": _scale,
    }
    lines = [report["machine"]]
    figures: list[Report] = []
    for part, write in writers.items():
        if part in report:
            lines += ["", *write(report[part])]
            figures += report[part].get("figures", [])
    if figures:
        lines += ["", f"{'figure':<58}{'measured':>9}{'reach':>10}"]
    for figure in figures:
        sign = ">=" if figure["at_least"] else "<="
        met = "" if figure["met"] else "   missed"
        lines.append(
            f"{figure['name']:<58}{figure['value']:9.2f}{sign:>4} {figure['reach']:5g}{met}"
        )
    return "\n".join(lines)


def _paths(part: Report) -> Iterator[str]:
    ms, fastest, rates = part["ms"], part["fastest_ms"], part["gb_per_s"]
    yield (
        f"{part['parameters']:,} parameters, density {part['density']}, "
        f"{part['repeats']} repetitions, kernels: {part['kernels']}"
    )
    yield f"{'path':<26}{'median ms':>10}{'fastest':>9}{'x np.add':>10}{'GB/s':>7}"
    for name, taken in ms.items():
        rate = f"{rates[name]:7.1f}" if name in rates else ""
        yield f"{name:<26}{taken:10.2f}{fastest[name]:9.2f}{taken / ms['np.add']:10.2f}{rate}"


def _index(part: Report) -> Iterator[str]:
    yield f"{'support':<16}{'density':>8}{'bits/entry':>12}{'as if random':>14}{'entropy':>9}"
    for (name, density), row in {(r["support"], r["density"]): r for r in part["rows"]}.items():
        bits = f"{row['bits']:12.3f}{row['random_bits']:14.3f}{row['chain_bits']:9.3f}"
        yield f"{name:<16}{density:8.1%}{bits}"


def _loopback(part: Report) -> Iterator[str]:
    yield f"one exchange, {part['request_bytes']:,} bytes up"
    for name, taken in part["ms"].items():
        yield f"{name:<26}{taken:10.2f} ms"


def _memory(part: Report) -> Iterator[str]:
    yield f"memory at {part['parameters']:,} parameters"
    for row in part["rows"]:
        for name, count in row.items():
            if name != "density":
                label = f"{row['density']:.1%}: {name.replace('_', ' ')}"
                yield f"{label:<50}{count:14,}"


def _warm_up(part: Report) -> Iterator[str]:
    yield f"first call: {part['cold_s']:.1f} s without a cache, {part['warm_s']:.1f} s with one"


def _scale(part: Report) -> Iterator[str]:
    names = list(part["sizes"][0]["ms"]) if part["sizes"] else []
    yield f"{'parameters':>14}" + "".join(f"{name + ' ms':>18}" for name in names)
    for row in part["sizes"]:
        yield f"{row['parameters']:14,}" + "".join(f"{row['ms'][n]:18.2f}" for n in names)
    for left_out in part["left_out_for_memory"]:
        yield f"{left_out:14,.0f}   left out: memory has no room"
    yield ""
    yield f"{'server':<14}{'workers':>8}{'walk ms':>10}{'compare ms':>12}{'np.subtract ms':>16}"
    for row in (*part["workers"], *part["grown"]):
        ms = row["ms"]
        times = f"{ms['walk']:10.2f}{ms['compare']:12.2f}{ms['np.subtract']:16.2f}"
        yield f"{row['parameters']:<14,}{row['workers']:8}{times}"
