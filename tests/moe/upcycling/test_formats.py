"""What lies on disk is what both generations of `transformers` read the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.upcycling import Options, UpcycleConfig, upcycle
from moe.upcycling.dense import dense_config
from moe.upcycling.source import INDEX
from tests.moe.upcycling.models import (
    KINDS,
    QUIET,
    change_config,
    error_of,
    logits,
    weights,
    write_dense,
)

GRANULAR = UpcycleConfig(8, 4, 2, "virtual-group")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _told(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "mixtral"),
        ({"rope_parameters": LLAMA3, "tie_word_embeddings": True, "shard": "60KB"}, "mixtral"),
        ({"rms_norm_eps": 1e-3, "num_key_value_heads": 4}, "mixtral"),
        ({"kind": "mistral", "sliding_window": 8, "head_dim": 32}, "mixtral"),
        ({"kind": "qwen2", "tie_word_embeddings": True, "shard": "60KB"}, "qwen2_moe"),
    ],
    ids=["theta", "llama3-tied-sharded", "eps", "window-and-head-dim", "qwen2-tied-sharded"],
)
def test_every_detail_of_the_source_comes_through(
    tmp_path: Path, settings: dict[str, Any], form: str
) -> None:
    dense = write_dense(tmp_path / "dense", **settings)
    assert error_of(dense, tmp_path / "moe", GRANULAR) < 1e-5
    assert _told(tmp_path / "moe")["model_type"] == form


@pytest.mark.parametrize("routing", ["topk-softmax", "softmax-topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_rope_is_told_in_the_words_of_version_4(kind: str, routing: Any, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", kind, rope_parameters=LLAMA3)
    config = UpcycleConfig(4, 2, routing=routing)
    upcycle(dense, tmp_path / "moe", config, options=QUIET)
    told = _told(tmp_path / "moe")
    assert told["rope_theta"] == 500000.0
    assert told["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert "rope_parameters" not in told


def test_fields_of_both_versions_mean_the_same() -> None:
    sizes = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), 8
    ) | {"model_type": "llama", "num_attention_heads": 2}
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old = dense_config({**sizes, "rope_theta": 500000.0, "rope_scaling": scaling})
    assert old == dense_config({**sizes, "rope_parameters": LLAMA3})
    typed = {**scaling, "type": "llama3"}
    del typed["rope_type"]
    assert old == dense_config({**sizes, "rope_theta": 500000.0, "rope_scaling": typed})
    assert dense_config(sizes).rope_scaling is None


def test_names_on_disk_are_the_unpacked_ones(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    upcycle(dense, tmp_path / "mixtral", UpcycleConfig(2, 1), options=QUIET)
    own = "model.layers.0.block_sparse_moe."
    named = {n.removeprefix(own) for n in weights(tmp_path / "mixtral") if n.startswith(own)}
    experts = {f"experts.{e}.{w}.weight" for e in range(2) for w in ("w1", "w2", "w3")}
    assert named == experts | {"gate.weight"}
    mixed = UpcycleConfig(2, 1, layers=(1,))
    upcycle(dense, tmp_path / "qwen", mixed, options=QUIET)
    found = weights(tmp_path / "qwen")
    assert "model.layers.0.mlp.gate_proj.weight" in found
    assert "model.layers.1.mlp.experts.1.down_proj.weight" in found
    assert found["model.layers.1.mlp.shared_expert.gate_proj.weight"].shape == (0, 64)
    assert _told(tmp_path / "qwen")["mlp_only_layers"] == [0]


def test_bfloat16_copies_keep_every_bit_and_scaled_ones_are_rounded_once(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", dtype=torch.bfloat16)
    assert error_of(dense, tmp_path / "copy", UpcycleConfig(4, 2)) < 1e-5
    assert error_of(dense, tmp_path / "vg", GRANULAR) < 0.02
    found, whole = weights(tmp_path / "vg"), weights(dense)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    up = whole["model.layers.0.mlp.up_proj.weight"][64:]
    scaled = (up.float() * 2**0.5).bfloat16()
    assert torch.equal(found["model.layers.0.block_sparse_moe.experts.1.w3.weight"], scaled)


def test_the_result_is_sharded_with_an_index(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    options = Options(measure=False, shard_bytes=100_000)
    upcycle(dense, tmp_path / "moe", UpcycleConfig(4, 2), options=options)
    index = json.loads((tmp_path / "moe" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert all((tmp_path / "moe" / file).stat().st_size < 110_000 for file in files)
    found = weights(tmp_path / "moe")
    assert set(found) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), atol=1e-4, rtol=1e-4)


def test_tokenizer_and_generation_files_go_along(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "LICENSE", "notes.txt"):
        (dense / name).write_text("{}")
    upcycle(dense, tmp_path / "moe", UpcycleConfig(4, 2), options=QUIET)
    there = {path.name for path in (tmp_path / "moe").iterdir()}
    assert there == {
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "upcycle_report.json",
    }


def test_defaults_of_the_source_are_written_out(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", rms_norm_eps=1e-6)
    told = _told(dense)
    del told["rms_norm_eps"]
    (dense / "config.json").write_text(json.dumps(told))
    change_config(dense, architectures=None)
    assert error_of(dense, tmp_path / "moe", UpcycleConfig(4, 2)) < 1e-5
    assert _told(tmp_path / "moe")["rms_norm_eps"] == 1e-6  # Mixtral's own default is another
