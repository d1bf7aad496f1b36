"""The factors are those of the equations, and settings that make no sense are refused."""

from __future__ import annotations

from typing import Any

import pytest

from moe.errors import UpcycleError
from moe.upcycling.config import UpcycleConfig, parse_layers
from moe.upcycling.scaling import factors, gain, gain_from_mass, gain_of


@pytest.mark.parametrize(
    ("experts", "top_k", "shards", "a", "s"),
    [(64, 8, 8, 64.0, 4.0), (8, 2, 1, 4.0, 1.5874), (8, 1, 1, 8.0, 2.0)],
)
def test_the_papers_numbers_come_out(
    experts: int, top_k: int, shards: int, a: float, s: float
) -> None:
    assert gain(experts, top_k, shards, "softmax-topk") == a
    assert factors("paper", a).gate == pytest.approx(s, abs=1e-4)


@pytest.mark.parametrize("scaling", ["exact", "down", "calibrated"])
def test_up_times_down_is_the_gain_and_the_gate_is_left_alone(scaling: Any) -> None:
    f = factors(scaling, 7.0)
    assert f.gate == 1.0
    assert f.up * f.down == pytest.approx(7.0)


def test_a_measured_mass_replaces_the_uniform_one() -> None:
    config = UpcycleConfig(8, 2, routing="softmax-topk", scaling="calibrated")
    assert gain_of(config, 0.5) == gain_from_mass(0.5, 1) == 2.0
    assert gain_from_mass(2 / 8, 1) == gain(8, 2, 1, "softmax-topk")
    with pytest.raises(UpcycleError, match="needs the mean top-k mass"):
        gain_of(config)
    with pytest.raises(UpcycleError, match="not in"):
        gain_from_mass(0.0, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": 0}, "whole number of at least 1"),
        ({"top_k": 9}, "above experts=8"),
        ({"granularity": 2}, "virtual-group"),
        ({"method": "magic"}, "choose one of copy"),
        ({"scaling": "magic"}, "choose one of exact"),
        ({"routing": "magic"}, "choose one of topk-softmax"),
        ({"method": "virtual-group", "granularity": 3, "top_k": 3}, "more replicas than others"),
        ({"method": "virtual-group", "granularity": 2, "shared_experts": 2}, "leave none to route"),
        ({"shared_experts": 1}, "leave none to route"),
        ({"fraction": 1.5}, "above 1"),
        ({"noise_scale": float("nan")}, "finite number above 0"),
        ({"router_std": 0.0}, "finite number above 0"),
        ({"seed": -1}, "whole number of at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UpcycleError, match=words):
        UpcycleConfig(**{"experts": 8, "top_k": 2, **settings})


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "3-1"])
def test_layers_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UpcycleError, match="such as 0-3,8"):
        parse_layers(text)
