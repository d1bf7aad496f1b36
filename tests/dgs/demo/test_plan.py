"""The demonstration's plan: equal samples, rates, and what the worker's script is told."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dgs.cli.demo import add_parser, make_plan
from dgs.demo.plan import CIFAR10, DIGITS, Plan, dense_method, learning_rate_share, sparse_method
from dgs.demo.train import make_parser
from dgs.errors import ConfigError


def _plan(*arguments: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return make_plan(parser.parse_args(["demo", *arguments]))


def test_steps_make_up_the_epochs_whatever_the_number_of_workers() -> None:
    task = replace(DIGITS, train_images=1000, batch=10)
    assert [task.steps_for(6, workers) for workers in (1, 2, 4, 7)] == [600, 300, 150, 86]
    assert task.steps_for(0.0001, 4) == 1


def test_momentum_does_not_change_how_far_one_gradient_moves_the_model() -> None:
    plan = _plan("--momentum", "0.75")
    dense, sparse = plan.methods
    assert plan.learning_rate(dense) == DIGITS.step_size
    assert plan.learning_rate(sparse) / (1 - 0.75) == pytest.approx(DIGITS.step_size)


def test_learning_rate_rises_and_then_falls_to_zero() -> None:
    shares = [learning_rate_share(s, 200, 0.1) for s in range(200)]
    assert shares[0] == 0.05
    assert max(shares) == shares[19]
    assert all(a > b for a, b in pairwise(shares[19:]))
    assert 0.0 < shares[-1] < 1e-3


def test_single_step_has_the_whole_learning_rate() -> None:
    assert learning_rate_share(0, 1, 0.05) == 1.0


def test_first_method_is_dense_and_the_second_one_takes_the_options() -> None:
    plan = _plan("--density", "0.02", "--momentum", "0.5", "--values", "int8", "--seed", "3")
    assert plan.methods == (
        dense_method(),
        sparse_method(momentum=0.5, density=0.02, download_density=0.02, values="int8"),
    )
    assert (plan.seed, plan.task, plan.device) == (3, DIGITS, "cpu")


def test_download_density_may_differ() -> None:
    sparse = _plan("--density", "0.02", "--download-density", "0.5").methods[1]
    assert (sparse.density, sparse.download_density) == (0.02, 0.5)


def test_data_dir_chooses_the_large_task(tmp_path: Path) -> None:
    plan = _plan("--data-dir", str(tmp_path), "--device", "cpu", "--workers", "2")
    assert plan.task == CIFAR10
    assert plan.steps == -(-CIFAR10.epochs * 50_000 // (2 * CIFAR10.batch))


@pytest.mark.parametrize(
    ("option", "value"),
    [("--density", "0"), ("--density", "2"), ("--download-density", "0"), ("--momentum", "1")],
)
def test_setting_out_of_range_is_refused_before_anything_starts(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=option[2:].replace("-", "_")):
        _plan(option, value)


def test_steps_and_epochs_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _plan("--steps", "1", "--epochs", "1")
    assert "not allowed with" in capsys.readouterr().err


def test_script_reads_what_the_plan_tells_it(tmp_path: Path) -> None:
    plan = _plan("--seed", "5", "--steps", "7", "--data-dir", str(tmp_path), "--device", "cpu")
    args = make_parser().parse_args(plan.arguments(plan.methods[1], tmp_path / "out.json"))
    assert (args.task, args.seed, args.steps, args.batch) == ("cifar10", 5, 7, CIFAR10.batch)
    assert (args.rule, args.momentum) == ("samomentum", plan.methods[1].momentum)
    assert (args.density, args.download_density, args.values) == (0.01, 0.01, "float32")
    assert args.lr == plan.learning_rate(plan.methods[1])
    assert (args.data_dir, args.out) == (tmp_path, tmp_path / "out.json")
