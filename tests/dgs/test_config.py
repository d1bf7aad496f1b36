"""Settings are checked when they are made, by name; what passes can travel."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from dgs._proto import parameter_server_pb2 as pb
from dgs.config import RetryConfig, ServerConfig, WorkerConfig
from dgs.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_below": 2**40}, "dense_below=1099511627776 .* >= 0 and <= 4294967295"),
        ({"dense_below": -1}, "dense_below=-1"),
        ({"dense_below": 1.0}, "dense_below=1.0 .* whole number"),
        ({"dense_below": True}, "dense_below=True"),
        ({"local_steps": True}, "local_steps=True"),
        ({"local_steps": 0}, "local_steps=0 .* whole number >= 1"),
        ({"local_steps": "2"}, "local_steps='2'"),
        ({"density": True}, "density=True"),
        ({"density": "0.1"}, "density='0.1'"),
        ({"density": None}, "density=None"),
        ({"density": np.float64("nan")}, "density="),
        ({"density": np.float32("inf")}, "density="),
        ({"density": 10**400}, "density=1000"),
        ({"download_density": np.bool_(True)}, "download_density="),
        ({"momentum": False}, r"momentum=False .* number in \[0, 1\)"),
        ({"overlap": "no"}, "overlap='no' .* give True or False"),
        ({"retry": 3.0}, "retry=3.0 .* give a RetryConfig"),
        ({"worker": 7}, "worker=7 .* give a string"),
        ({"worker": "w\udc80"}, r"worker='w\\udc80' .* printable characters"),
        ({"worker": "\x1b[31mred"}, "worker=.* printable characters"),
        ({"worker": "two\nlines"}, "worker=.* printable characters"),
        ({"worker": "w" * 129}, "worker=.* at most 128"),
    ],
)
def test_worker_settings_that_cannot_be_or_cannot_travel_are_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkerConfig(**settings)


@pytest.mark.parametrize(
    "settings", [{"max_parameters": 0}, {"max_workers": True}, {"hash_interval": 1.5}]
)
def test_server_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ServerConfig(**settings)


@pytest.mark.parametrize("seconds", [0, -1.0, np.nan, np.inf, 10**400, True, "1"], ids=range(7))
def test_waits_that_no_clock_can_measure_are_refused_by_name(seconds: Any) -> None:
    with pytest.raises(ConfigError, match=r"attempt_s=.* positive number of seconds, at most 1e9"):
        RetryConfig(attempt_s=seconds)


@pytest.mark.parametrize(
    "number",
    [0.5, np.float64(0.5), np.float32(0.5), Fraction(1, 2)],
    ids=lambda n: type(n).__name__,
)
def test_any_real_number_is_taken_as_a_float(number: Any) -> None:
    config = WorkerConfig(density=number, download_density=number, momentum=number)
    assert {type(config.density), type(config.momentum)} == {float}
    assert config == WorkerConfig(density=0.5, download_density=0.5, momentum=0.5)
    assert type(WorkerConfig(density=1).density) is float
    assert type(RetryConfig(budget_s=number).budget_s) is float


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3)], ids=lambda n: type(n).__name__)
def test_any_whole_number_is_taken_as_an_int(number: Any) -> None:
    config = WorkerConfig(local_steps=number, dense_below=number)
    assert {type(config.local_steps), type(config.dense_below)} == {int}
    assert type(ServerConfig(max_workers=number).max_workers) is int


@pytest.mark.parametrize("name", ["w", "worker-0", "B\xe4r", "node 7/gpu:3", "w" * 128])
def test_what_a_worker_config_accepts_can_travel(name: str) -> None:
    config = WorkerConfig(worker=name, dense_below=2**32 - 1, density=1.0)
    request = pb.JoinRequest(worker=config.worker, dense_below=config.dense_below)
    assert pb.JoinRequest.FromString(request.SerializeToString()).worker == name
