"""From what server and workers counted to a table and to JSON; arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dgs.demo.plan import Method, Plan

__all__ = [
    "COLUMNS",
    "Outcome",
    "ServerCounts",
    "WorkerCounts",
    "footnotes",
    "outcome",
    "report",
    "rows",
]

COLUMNS = (
    "method",
    "accuracy",
    "up B/step",
    "down B/step",
    "up",
    "down",
    "stale p50",
    "p99",
    "steps/s",
)
"""Headings of the table; ``up`` and ``down`` alone are ratios to dense."""

FLOAT_BYTES = 4

WorkerCounts = Mapping[str, Any]
"""What one worker's script wrote: see `dgs.demo.train`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCounts:
    """What the server has counted over all exchanges of a run, the workers that left included."""

    version: int
    """Updates applied."""
    bytes_up: int
    bytes_down: int
    staleness_p50: float
    staleness_p99: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one method did."""

    method: str
    accuracy: float
    """Of the server's model on the test images, in [0, 1]."""
    test_loss: float
    loss_first: float
    """Mean training loss of the first tenth of the steps, all workers."""
    loss_last: float
    """Mean training loss of the last tenth."""
    exchanges: int
    bytes_up: int
    """Of all update frames, as the server counts them."""
    bytes_down: int
    """Of all difference frames, as the server counts them."""
    workers_bytes_up: int
    """The same as the workers count them: more than the server's if an exchange was repeated."""
    workers_bytes_down: int
    up_bytes_per_step: float
    """Of one worker's exchange, on average."""
    down_bytes_per_step: float
    up_ratio: float
    """How many times fewer bytes than 4 per parameter."""
    down_ratio: float
    staleness_p50: float
    staleness_p99: float
    steps_per_s: float
    """Of all workers together, from the first one's first step to the last one's last."""
    train_s: float
    cpu_s: float
    """Processor seconds of server and workers, in user code, starting up included."""
    resyncs: int


def outcome(
    method: str,
    parameters: int,
    server: ServerCounts,
    workers: Sequence[WorkerCounts],
    *,
    accuracy: float,
    test_loss: float,
    cpu_s: float,
) -> Outcome:
    """Put one method's counts together.

    ``ratio = 4 * parameters / bytes per exchange``: what plain float32 gradients would take.

    Args:
        method: its name.
        parameters: trained entries of the model.
        server: the server's counts at the end.
        workers: one for each worker.
        accuracy: of the server's model.
        test_loss: of the server's model.
        cpu_s: processor seconds of all processes.
    """
    exchanges = max(1, server.version)
    dense_bytes = FLOAT_BYTES * parameters
    train_s = max(w["ended"] for w in workers) - min(w["began"] for w in workers)
    up, down = server.bytes_up / exchanges, server.bytes_down / exchanges
    return Outcome(
        method=method,
        accuracy=accuracy,
        test_loss=test_loss,
        loss_first=_mean([w["loss_first"] for w in workers]),
        loss_last=_mean([w["loss_last"] for w in workers]),
        exchanges=server.version,
        bytes_up=server.bytes_up,
        bytes_down=server.bytes_down,
        workers_bytes_up=sum(w["bytes_up"] for w in workers),
        workers_bytes_down=sum(w["bytes_down"] for w in workers),
        up_bytes_per_step=up,
        down_bytes_per_step=down,
        up_ratio=_ratio(dense_bytes, up),
        down_ratio=_ratio(dense_bytes, down),
        staleness_p50=server.staleness_p50,
        staleness_p99=server.staleness_p99,
        steps_per_s=_ratio(server.version, train_s),
        train_s=train_s,
        cpu_s=cpu_s,
        resyncs=sum(w["resyncs"] for w in workers),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0


def report(plan: Plan, parameters: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything as plain numbers and strings, for ``--json``."""
    settings = {m.name: _settings(plan, m) for m in plan.methods}
    return {
        "task": plan.task.name,
        "parameters": parameters,
        "dense_bytes": FLOAT_BYTES * parameters,
        "workers": plan.workers,
        "steps_per_worker": plan.steps,
        "batch": plan.task.batch,
        "samples": plan.workers * plan.steps * plan.task.batch,
        "warmup": plan.task.warmup,
        "weight_decay": plan.task.weight_decay,
        "clip": plan.task.clip,
        "seed": plan.seed,
        "device": plan.device,
        "methods": [{**asdict(o), "settings": settings[o.method]} for o in outcomes],
    }


def _settings(plan: Plan, method: Method) -> dict[str, Any]:
    settings = asdict(method)
    del settings["name"]
    return settings | {"lr": plan.learning_rate(method)}


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Lay the outcomes out under `COLUMNS`."""
    return [
        [
            o.method,
            f"{100 * o.accuracy:.2f} %",
            f"{o.up_bytes_per_step:,.0f}",
            f"{o.down_bytes_per_step:,.0f}",
            f"1/{o.up_ratio:.1f}",
            f"1/{o.down_ratio:.1f}",
            f"{o.staleness_p50:g}",
            f"{o.staleness_p99:g}",
            f"{o.steps_per_s:.3g}",
        ]
        for o in outcomes
    ]


def footnotes(plan: Plan, parameters: int) -> list[str]:
    """Say with which settings the table came about, and what its columns mean."""
    task = plan.task
    decay = f", weight decay {task.weight_decay:g}" if task.weight_decay else ""
    return [
        f"{task.name}: {parameters:,} parameters; each method {plan.workers} workers x "
        f"{plan.steps} steps x {task.batch} images; seed {plan.seed}; {plan.device}",
        f"SGD, gradient norm at most {task.clip:g}{decay}; the learning rate rises over the first "
        f"{100 * task.warmup:g} % of the steps and falls to 0 as a cosine",
        *(f"{m.name}: {_in_words(plan, m)}" for m in plan.methods),
        "accuracy: of the server's model on test images; bytes: of one worker's exchange; up and "
        f"down alone: share of {FLOAT_BYTES} bytes x parameters = {FLOAT_BYTES * parameters:,}",
        "every frame includes the BatchNorm statistics, which are averaged, and leaves out "
        "entries that are exactly 0; stale: updates of others between two of a worker's own",
    ]


def _in_words(plan: Plan, method: Method) -> str:
    return (
        f"rule {method.rule}, momentum {method.momentum:g}, learning rate "
        f"{plan.learning_rate(method):g}; density {method.density:g} up and "
        f"{method.download_density:g} down; values {method.values}"
    )
