"""The demonstration's report, on numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dgs.demo.plan import DIGITS, Plan, dense_method, sparse_method
from dgs.demo.report import COLUMNS, Outcome, ServerCounts, footnotes, outcome, report, rows

PLAN = Plan(
    task=DIGITS,
    methods=(
        dense_method(),
        sparse_method(momentum=0.5, density=0.01, download_density=0.02, values="int8"),
    ),
    workers=2,
    steps=100,
    seed=7,
    device="cpu",
)

SERVER = ServerCounts(
    version=200, bytes_up=100_000, bytes_down=50_000, staleness_p50=1.0, staleness_p99=4.0
)


def _worker(**changes: Any) -> dict[str, Any]:
    counts = {
        "steps": 100,
        "exchanges": 100,
        "bytes_up": 50_000,
        "bytes_down": 25_000,
        "setup_bytes": 9,
        "resyncs": 0,
        "loss_first": 2.0,
        "loss_last": 0.5,
        "began": 10.0,
        "ended": 14.0,
    }
    return counts | changes


def _outcome(method: str = "DGS 1 %", server: ServerCounts = SERVER) -> Outcome:
    workers = [
        _worker(),
        _worker(began=12.0, ended=20.0, loss_first=1.0, loss_last=0.1, bytes_up=50_001, resyncs=1),
    ]
    return outcome(method, 10_000, server, workers, accuracy=0.98765, test_loss=0.04, cpu_s=12.5)


def test_bytes_and_ratios_are_per_exchange_and_to_four_bytes_a_parameter() -> None:
    made = _outcome()
    assert (made.up_bytes_per_step, made.down_bytes_per_step) == (500.0, 250.0)
    assert (made.up_ratio, made.down_ratio) == (80.0, 160.0)


def test_rate_is_of_all_workers_from_the_first_start_to_the_last_end() -> None:
    made = _outcome()
    assert made.train_s == 10.0
    assert made.steps_per_s == 20.0


def test_losses_are_averaged_and_counts_are_added_over_workers() -> None:
    made = _outcome()
    assert made.loss_first == 1.5
    assert made.loss_last == pytest.approx(0.3)
    assert (made.workers_bytes_up, made.workers_bytes_down) == (100_001, 50_000)
    assert made.resyncs == 1


def test_staleness_and_bytes_are_the_servers() -> None:
    made = _outcome()
    assert (made.staleness_p50, made.staleness_p99) == (1.0, 4.0)
    assert (made.bytes_up, made.bytes_down, made.exchanges) == (100_000, 50_000, 200)


def test_nothing_is_divided_by_zero_when_nothing_was_exchanged() -> None:
    empty = ServerCounts(version=0, bytes_up=0, bytes_down=0, staleness_p50=0.0, staleness_p99=0.0)
    made = _outcome(server=empty)
    assert (made.up_ratio, made.down_ratio, made.steps_per_s) == (0.0, 0.0, 0.0)


def test_rows_have_a_cell_for_every_column() -> None:
    [row] = rows([_outcome()])
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "method": "DGS 1 %",
        "accuracy": "98.77 %",
        "up B/step": "500",
        "down B/step": "250",
        "up": "1/80.0",
        "down": "1/160.0",
        "stale p50": "1",
        "p99": "4",
        "steps/s": "20",
    }


def test_report_is_json_with_the_settings_of_each_method() -> None:
    made = json.loads(json.dumps(report(PLAN, 10_000, [_outcome("dense ASGD"), _outcome()])))
    assert made["dense_bytes"] == 40_000
    assert made["samples"] == 2 * 100 * DIGITS.batch
    dense, sparse = made["methods"]
    assert dense["settings"]["rule"] == "none"
    assert sparse["settings"] == {
        "rule": "samomentum",
        "momentum": 0.5,
        "density": 0.01,
        "download_density": 0.02,
        "values": "int8",
        "lr": PLAN.learning_rate(PLAN.methods[1]),
    }


def test_footnotes_tell_the_settings() -> None:
    text = "\n".join(footnotes(PLAN, 10_000))
    for said in ("10,000 parameters", "seed 7", "momentum 0.5", "0.02 down", "int8", "40,000"):
        assert said in text
