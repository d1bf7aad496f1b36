"""Bad input ends with an error that names it, and with nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe.errors import CheckpointError, MoeError, UpcycleError
from moe.upcycling import UpcycleConfig, upcycle
from moe.upcycling.plan import Piece, _account, make_plan
from moe.upcycling.source import INDEX, SINGLE, open_dense
from tests.moe.upcycling.models import QUIET, change_config, weights, write_plain

COPY = UpcycleConfig(4, 2)
UP = "model.layers.1.mlp.up_proj.weight"


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: change_config(path, **changes)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        found = weights(path)
        change(found)
        save_file(found, path / SINGLE, metadata={"format": "pt"})

    return spoil


def _cut_short(path: Path) -> None:
    whole = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(whole[: len(whole) // 2])


def _index(mapping: dict[str, str]) -> Callable[[Path], object]:
    return lambda path: (path / INDEX).write_text(json.dumps({"weight_map": mapping}))


CASES: dict[str, tuple[Callable[[Path], object], type[MoeError], str]] = {
    "architecture": (
        _config(model_type="gpt2"),
        UpcycleError,
        "'gpt2' is not supported; supported are: llama, mistral, qwen2",
    ),
    "no-architecture": (_config(model_type=None), UpcycleError, "is not supported"),
    "bias": (_config(attention_bias=True), UpcycleError, "attention_bias"),
    "quantised": (_config(quantization_config={"bits": 4}), UpcycleError, "quantised"),
    "partial-rope": (_config(partial_rotary_factor=0.5), UpcycleError, "partial_rotary_factor"),
    "no-width": (_config(intermediate_size=None), CheckpointError, "intermediate_size=None"),
    "other-width": (
        _config(intermediate_size=48),
        CheckpointError,
        r"gate_proj.weight has shape \[32, 16\], where config.json says \[48, 16\]",
    ),
    "more-layers": (_config(num_hidden_layers=3), CheckpointError, "layers.2.* is missing"),
    "fewer-layers": (_config(num_hidden_layers=1), CheckpointError, "layers.1.* has no use"),
    "not-tied": (_config(tie_word_embeddings=False), CheckpointError, "lm_head.weight"),
    "missing-tensor": (_tensors(lambda t: t.pop(UP)), CheckpointError, f"{UP}, which is missing"),
    "strange-tensor": (
        _tensors(lambda t: t.update(extra=torch.ones(2))),
        CheckpointError,
        "extra has no use",
    ),
    "whole-numbers": (
        _tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})),
        CheckpointError,
        "is of type I8",
    ),
    "truncated": (_cut_short, CheckpointError, "damaged or cut short"),
    "no-weights": (lambda p: (p / SINGLE).unlink(), CheckpointError, "has neither"),
    "no-config": (
        lambda p: (p / "config.json").unlink(),
        CheckpointError,
        "config.json is missing",
    ),
    "no-json": (
        lambda p: (p / "config.json").write_text("{"),
        CheckpointError,
        "config.json cannot be read",
    ),
    "missing-shard": (_index({UP: "model-2.safetensors"}), CheckpointError, "model-2.* is missing"),
    "shard-elsewhere": (_index({UP: "../x.safetensors"}), CheckpointError, "plain file name"),
    "index-contradicts": (_index({UP: SINGLE}), CheckpointError, "does not say"),
    "empty-index": (_index({}), CheckpointError, "no weight_map"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_source_that_is_wrong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    spoil, kind, words = CASES[case]
    dense = write_plain(tmp_path / "dense")
    spoil(dense)
    with pytest.raises(kind, match=words):
        upcycle(dense, tmp_path / "moe", COPY, options=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (UpcycleConfig(3, 3, 3, "virtual-group"), "width 32 is not divisible by granularity=3"),
        (UpcycleConfig(4, 2, layers=(0, 2)), "layer 2 does not exist; layers are 0-1"),
        (UpcycleConfig(4, 2, layers=()), "makes no layer a mixture"),
        (UpcycleConfig(4, 2, method="branch-train-mix"), "at least two dense checkpoints"),
    ],
    ids=["width", "layer", "no-layer", "no-branch"],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    config: UpcycleConfig, words: str, tmp_path: Path
) -> None:
    dense = write_plain(tmp_path / "dense")
    with pytest.raises(UpcycleError, match=words):
        upcycle(dense, tmp_path / "moe", config, options=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_what_qwen2_moe_cannot_hold_is_refused(tmp_path: Path) -> None:
    dense = write_plain(tmp_path / "dense")
    change_config(dense, model_type="mistral", sliding_window=8, num_key_value_heads=2)
    soft = UpcycleConfig(4, 2, routing="softmax-topk")
    with pytest.raises(UpcycleError, match="sliding_window=8 means different things"):
        upcycle(dense, tmp_path / "moe", soft, options=QUIET)
    change_config(dense, sliding_window=None, head_dim=8)
    upcycle(dense, tmp_path / "moe", soft, options=QUIET)  # 2 heads of 8 are the 16 there are


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_config(rms_norm_eps=0.5), "its configuration is not that of"),
        (_tensors(lambda t: t.update({UP: t[UP].half()})), "is of type torch.float16"),
    ],
    ids=["config", "type"],
)
def test_branches_that_differ_are_refused(
    spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    dense, other = write_plain(tmp_path / "dense"), write_plain(tmp_path / "other")
    spoil(other)
    config = UpcycleConfig(4, 2, method="branch-train-mix")
    with pytest.raises(CheckpointError, match=words):
        upcycle(dense, tmp_path / "moe", config, [other], QUIET)
    with pytest.raises(UpcycleError, match="need --method branch-train-mix"):
        upcycle(dense, tmp_path / "moe", COPY, [other], QUIET)
    third = UpcycleConfig(3, 2, method="branch-train-mix")
    with pytest.raises(UpcycleError, match="multiple of the 2 dense checkpoints"):
        upcycle(dense, tmp_path / "moe", third, [dense], QUIET)


def test_every_tensor_of_the_source_has_one_destination(tmp_path: Path) -> None:
    source = open_dense(write_plain(tmp_path / "dense"))
    plan = make_plan(COPY, [source])
    copied = [str(p.source) for p in plan.pieces if p.kind == "copy"]
    made = {str(p.source) for p in plan.pieces if p.kind == "expert"}
    assert sorted([*copied, *made]) == sorted(source.tensors)
    lost = [p for p in plan.pieces if p.source != UP]
    with pytest.raises(CheckpointError, match=f"{UP} would not be used"):
        _account(source, lost)
    again = Piece("other", torch.float32, (32, 16), "copy", UP)
    with pytest.raises(CheckpointError, match=f"{UP} would be used by"):
        _account(source, [*plan.pieces, again])


def test_buffers_that_old_checkpoints_derive_are_left_out(tmp_path: Path) -> None:
    dense = write_plain(tmp_path / "dense")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _tensors(lambda t: t.update({name: torch.ones(4)}))(dense)
    upcycle(dense, tmp_path / "moe", COPY, options=QUIET)
    assert name not in weights(tmp_path / "moe")
