"""Settings that cannot work are refused when they are made, with the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe.capacity import capacity
from moe.config import (
    CapacityConfig,
    ConfigError,
    ExpertConfig,
    LossConfig,
    MoeConfig,
    RouterConfig,
)
from moe.errors import MoeError, RoutingError

WRONG: list[tuple[type, dict[str, Any], str]] = [
    (RouterConfig, {"num_experts": 0, "top_k": 1}, "num_experts=0"),
    (RouterConfig, {"num_experts": 8, "top_k": 0}, "top_k=0"),
    (RouterConfig, {"num_experts": 8, "top_k": True}, "top_k=True"),
    (RouterConfig, {"num_experts": 8, "top_k": 2, "score": "sinkhorn"}, "choose one of"),
    (RouterConfig, {"num_experts": 8, "top_k": 2, "scale": 0.0}, "above 0"),
    (RouterConfig, {"num_experts": 8, "top_k": 2, "jitter": 1.0}, "half width"),
    (RouterConfig, {"num_experts": 8, "top_k": 2, "jitter": float("nan")}, "jitter"),
    (RouterConfig, {"num_experts": 8, "top_k": 2, "groups": (3, 1)}, "do not divide"),
    (RouterConfig, {"num_experts": 8, "top_k": 2, "groups": (4, 5)}, "have to fit"),
    (RouterConfig, {"num_experts": 8, "top_k": 3, "groups": (4, 1)}, "have to fit"),
    (
        RouterConfig,
        {"num_experts": 8, "top_k": 2, "score": "topk-softmax", "renormalise": True},
        "already",
    ),
    (RouterConfig, {"num_experts": 8, "top_k": 2, "groups": 3}, "groups=3.*a pair"),
    (RouterConfig, {"num_experts": 8, "top_k": 2, "groups": (4, 2, 1)}, "a pair"),
    (MoeConfig, {"router": None, "experts": None}, "router=None.*RouterConfig"),
    (MoeConfig, {"router": RouterConfig(8, 2), "experts": None}, "experts=None.*ExpertConfig"),
    (
        MoeConfig,
        {"router": RouterConfig(8, 2), "experts": ExpertConfig(8, 8), "capacity": 1.0},
        "capacity=1.0.*CapacityConfig",
    ),
    (CapacityConfig, {"factor": 0.0}, "above 0"),
    (CapacityConfig, {"factor": float("inf")}, "finite"),
    (CapacityConfig, {"factor": 1.0, "scope": "sequence"}, "full-sequence"),
    (CapacityConfig, {"factor": 1.0, "by": "probs"}, "probability"),
    (ExpertConfig, {"hidden": 0, "intermediate": 8}, "hidden=0"),
    (ExpertConfig, {"hidden": 8, "intermediate": -1}, "intermediate=-1"),
    (ExpertConfig, {"hidden": 8, "intermediate": 8, "activation": "gelu"}, "swiglu"),
    (ExpertConfig, {"hidden": 8, "intermediate": 8, "shared": -1}, "shared=-1"),
    (ExpertConfig, {"hidden": 8, "intermediate": 8, "shared_gate": True}, "no shared expert"),
    (LossConfig, {"balance": -0.1}, "not negative"),
    (LossConfig, {"scope": "batch"}, "micro-batch"),
    (LossConfig, {"z": float("nan")}, "finite"),
]


@pytest.mark.parametrize(
    ("kind", "given", "says"), WRONG, ids=[f"{k.__name__}-{i}" for i, (k, _, _) in enumerate(WRONG)]
)
def test_wrong_settings_are_refused_with_the_remedy(
    kind: type, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        kind(**given)


def test_a_capacity_factor_from_numpy_means_its_decimal_digits() -> None:
    config = CapacityConfig(np.float64(1.1))
    assert config == CapacityConfig(1.1)
    assert repr(config) == repr(CapacityConfig(1.1))
    assert capacity(10, 2, 2, np.float64(1.1)) == 10
    assert capacity(10, 1, 2, config.factor) == 6


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(RoutingError, match=r"top_k=9 is above num_experts=8.*top_k <= 8"):
        RouterConfig(8, 9)


@pytest.mark.parametrize("given", [{"score": "topk-softmax"}, {"renormalise": True}])
def test_a_single_choice_whose_weight_is_always_one_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="would never learn"):
        RouterConfig(8, 1, **given)
    assert RouterConfig(1, 1, **given).top_k == 1  # with one expert there is nothing to learn


def test_errors_are_of_the_package_and_value_errors() -> None:
    assert issubclass(ConfigError, MoeError)
    assert issubclass(ConfigError, ValueError)
