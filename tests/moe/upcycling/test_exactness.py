"""Which upcycled models compute what the dense ones do, in `transformers`, and which do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe.errors import UpcycleError
from moe.upcycling import UpcycleConfig, upcycle
from tests.moe.upcycling.models import KINDS, QUIET, error_of, logits, write_dense

EXACT = 1e-5


@pytest.fixture(scope="module", params=KINDS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "model", request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "model", "llama")


def _granular(**settings: Any) -> UpcycleConfig:
    wanted = {"experts": 16, "top_k": 4, "granularity": 4, "method": "virtual-group", **settings}
    return UpcycleConfig(**wanted)


@pytest.mark.parametrize(
    "config",
    [
        UpcycleConfig(8, 2),
        UpcycleConfig(5, 3, router_init="uniform", router_std=1.0),
        UpcycleConfig(3, 3),
        UpcycleConfig(4, 1),
        UpcycleConfig(8, 2, scaling="paper"),
        _granular(),
        _granular(top_k=8),
        _granular(scaling="down", router_std=1.0),
        _granular(scaling="calibrated"),
        UpcycleConfig(4, 2, 2, "virtual-group", layers=(1,)),
        UpcycleConfig(6, 3, 4, "virtual-group", shared_experts=1),
        UpcycleConfig(4, 2, 4, "virtual-group", shared_experts=2, layers=(0,)),
        UpcycleConfig(4, 2, router_init="centroid"),
        UpcycleConfig(8, 2, routing="softmax-topk", router_std=1e-7),
    ],
    ids=lambda c: (
        f"E{c.experts}T{c.top_k}G{c.granularity}-{c.scaling}-{c.routing}-{c.router_init}"
        f"-shared{c.shared_experts}-std{c.router_std}-{'mixed' if c.layers else 'all'}"
    ),
)
def test_the_dense_function_is_preserved(
    dense: Path, tmp_path: Path, config: UpcycleConfig
) -> None:
    assert error_of(dense, tmp_path / "moe", config) < EXACT


@pytest.mark.parametrize(
    ("config", "least", "most"),
    [
        (_granular(scaling="paper"), 0.05, 0.5),
        (_granular(scaling="none"), 0.4, 2.0),
        (UpcycleConfig(8, 2, routing="softmax-topk"), 0.02, 0.4),
        (UpcycleConfig(8, 2, routing="softmax-topk", router_std=1e-4), 1e-5, 0.005),
        (UpcycleConfig(8, 2, routing="softmax-topk", scaling="none"), 0.4, 1.0),
        (_granular(routing="softmax-topk"), 0.01, 0.4),
        # not smaller: equal probabilities let transformers' top-k split groups
        (_granular(routing="softmax-topk", router_std=1e-5), 1e-7, 1e-3),
        (UpcycleConfig(4, 2, method="drop"), 0.3, 2.0),
        (UpcycleConfig(4, 2, method="drop", drop_scope="matrix"), 0.3, 2.0),
        (_granular(method="noise"), 1e-3, 0.1),
    ],
    ids=[
        "cube-root-and-swiglu",
        "no-scaling",
        "softmax-first",
        "softmax-first-small-router",
        "softmax-first-no-scaling",
        "softmax-first-granular",
        "softmax-first-granular-small-router",
        "drop",
        "drop-per-matrix",
        "noise",
    ],
)
def test_what_does_not_preserve_it_is_off_by_what_is_known(
    llama: Path, tmp_path: Path, config: UpcycleConfig, least: float, most: float
) -> None:
    assert least < error_of(llama, tmp_path / "moe", config) < most


def test_calibrated_scaling_is_nearer_than_that_for_a_uniform_router(
    llama: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"routing": "softmax-topk", "router_std": 0.16}
    uniform = error_of(llama, tmp_path / "uniform", _granular(**settings))
    measured = error_of(llama, tmp_path / "measured", _granular(scaling="calibrated", **settings))
    assert measured < 0.7 * uniform


def test_branches_that_are_the_same_model_preserve_it(llama: Path, tmp_path: Path) -> None:
    twin = write_dense(tmp_path / "twin", "llama")
    config = UpcycleConfig(4, 2, method="branch-train-mix")
    upcycle(llama, tmp_path / "moe", config, [twin], QUIET)
    dense = logits(llama)
    assert float((logits(tmp_path / "moe") - dense).norm() / dense.norm()) < EXACT


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_a_top_k_that_is_not_a_multiple_of_the_shards_is_refused_with_the_reason(
    top_k: int,
) -> None:
    with pytest.raises(UpcycleError, match="some shards of the dense FFN more often than others"):
        _granular(top_k=top_k)
