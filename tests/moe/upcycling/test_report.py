"""The report tells what is so: measured errors, loads and sizes, and a warning with the number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.errors import UpcycleError
from moe.upcycling import Options, UpcycleConfig, upcycle
from moe.upcycling.convert import REPORT
from moe.upcycling.measure import calibrate, observe, tokenize
from moe.upcycling.report import as_text
from tests.moe.upcycling.models import QUIET, VOCAB, logits, quietly, weights, write_dense

OPTIONS = Options(text="To be, or not to be, that is the question. " * 8, tokens=200)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quietly():  # skips where models cannot be run
        return write_dense(tmp_path_factory.mktemp("dense") / "model")


def _report(dense: Path, target: Path, **settings: Any) -> dict[str, Any]:
    return upcycle(dense, target, UpcycleConfig(**settings), options=OPTIONS)


def test_an_exact_conversion_reports_no_error_and_no_warning(dense: Path, tmp_path: Path) -> None:
    report = _report(dense, tmp_path / "moe", experts=8, top_k=2)
    measured = report["preservation"]
    assert measured["relative_logit_error"] < 1e-5
    assert measured["argmax_agreement"] == 1.0
    assert measured["layer_output_ratio"] == pytest.approx([1.0, 1.0], abs=1e-4)
    for router in measured["routers"]:
        assert sum(router["load"]) == pytest.approx(1.0)
        assert len(router["load"]) == 8
        assert 0 < router["entropy"] <= 2.0795
        assert router["tokens_with_split_groups"] == 0
    assert report["warnings"] == []
    assert json.loads((tmp_path / "moe" / REPORT).read_text()) == report
    assert "argmax agreement 100.00%" in as_text(report)


def test_an_inexact_conversion_is_warned_of_with_the_measured_number(
    dense: Path, tmp_path: Path
) -> None:
    report = _report(
        dense,
        tmp_path / "moe",
        experts=8,
        top_k=4,
        granularity=4,
        method="virtual-group",
        scaling="paper",
    )
    measured = report["preservation"]
    assert measured["relative_logit_error"] > 0.05
    (warning,) = report["warnings"]
    assert f"{measured['relative_logit_error']:.3g}" in warning
    assert "cube root" in warning
    assert "warning: the dense function is not preserved" in as_text(report)


def test_output_ratio_without_scaling_shows_what_is_missing(dense: Path, tmp_path: Path) -> None:
    report = _report(
        dense,
        tmp_path / "moe",
        experts=8,
        top_k=4,
        granularity=4,
        method="virtual-group",
        scaling="none",
    )
    assert report["preservation"]["layer_output_ratio"][0] == pytest.approx(0.25, rel=1e-3)


def test_parameters_are_counted_as_they_are(dense: Path, tmp_path: Path) -> None:
    report = _report(dense, tmp_path / "moe", experts=8, top_k=2)
    total = sum(t.numel() for t in weights(tmp_path / "moe").values())
    ffns = 2 * 3 * 64 * 128
    counts = report["parameters"]
    assert counts["total"] == total
    assert counts["dense"] == sum(t.numel() for t in weights(dense).values())
    assert counts["active"] == total - 6 * ffns
    # all that multiplies a token: one more FFN and the router per layer
    base = report["flops_per_token"]["dense"]
    assert report["flops_per_token"]["mixture"] == base + 2 * (ffns + 2 * 8 * 64)


def test_a_measurement_that_was_not_made_is_said_so(dense: Path, tmp_path: Path) -> None:
    config = UpcycleConfig(4, 2, routing="softmax-topk")
    report = upcycle(dense, tmp_path / "moe", config, options=QUIET)
    assert report["preservation"] is None
    assert "not measured: it was not asked for" in as_text(report)
    assert "how much was not measured" in report["warnings"][0]


def test_without_transformers_it_is_skipped_with_a_line_that_says_so(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.upcycling.convert.has_transformers", lambda: False)
    report = upcycle(dense, tmp_path / "moe", UpcycleConfig(4, 2))
    assert "not measured: transformers is not installed" in as_text(report)
    config = UpcycleConfig(4, 2, router_init="centroid")
    with pytest.raises(UpcycleError, match=r"install dgs\[hf\]"):
        upcycle(dense, tmp_path / "other", config)


def test_a_router_that_cannot_learn_is_warned_of(dense: Path, tmp_path: Path) -> None:
    report = upcycle(dense, tmp_path / "moe", UpcycleConfig(4, 1), options=QUIET)
    assert "gets no gradient" in report["warnings"][0]


def test_groups_that_half_precision_would_split_are_counted(tmp_path: Path) -> None:
    path = write_dense(tmp_path / "dense", dtype=torch.bfloat16)
    config = UpcycleConfig(256, 8, 2, "virtual-group")
    report = upcycle(path, tmp_path / "moe", config, options=OPTIONS)
    routers = report["preservation"]["routers"]
    assert sum(r["tokens_with_split_groups"] for r in routers) == 0
    assert sum(r["tokens_with_split_groups_in_half"] for r in routers) > 0
    assert "splits groups of shards" in report["warnings"][-1]


def test_calibration_sees_what_the_router_sees(dense: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"routing": "softmax-topk", "scaling": "calibrated"}
    report = _report(dense, tmp_path / "moe", experts=8, top_k=2, router_std=0.1, **settings)
    first = report["preservation"]["routers"][0]
    # the first layer's inputs are the dense model's, whatever the experts do
    assert report["calibrated_top_k_mass"]["0"] == pytest.approx(first["top_k_mass"], rel=1e-4)
    assert report["preservation"]["layer_output_ratio"][0] == pytest.approx(1.0, abs=0.05)


def test_centroids_follow_the_text(dense: Path) -> None:
    config = UpcycleConfig(4, 2, router_init="centroid")
    made = [
        calibrate(dense, tokenize(dense, text, VOCAB, 128), config, [0])[0].rows
        for text in ("some words, and some more of them", "12345 67890 " * 4)
    ]
    assert not torch.allclose(made[0], made[1])
    assert made[0].norm(dim=1).tolist() == pytest.approx([0.02 * 64**0.5] * 4, rel=1e-4)


def test_what_is_observed_is_what_the_model_computes(dense: Path) -> None:
    ids = (torch.arange(64) * 37 % VOCAB).view(1, -1)
    torch.testing.assert_close(observe(dense, ids).logits, logits(dense))


def test_text_becomes_bytes_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    ids = tokenize(tmp_path, "ab" * 300, 97, 512)
    assert ids.shape == (2, 256)
    assert ids[0, :2].tolist() == [ord("a") % 97, ord("b") % 97]
    with pytest.raises(UpcycleError, match="fewer than 2 tokens"):
        tokenize(tmp_path, "", 97, 512)


def test_a_tokenizer_that_is_there_is_used(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    with quietly() as transformers:
        words = {"to": 0, "be": 1, "or": 2, "?": 3}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path)
        assert tokenize(tmp_path, "to be or not", 97, 512).tolist() == [[0, 1, 2, 3]]
