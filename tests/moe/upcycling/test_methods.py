"""What the methods do to weights: every neuron used, coherent drops, seeds, averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe.upcycling import UpcycleConfig, upcycle
from moe.upcycling.config import DropScope
from moe.upcycling.methods import MATRICES, NEURONS, add_noise, dropped_neurons, generator, redraw
from tests.moe.upcycling.models import QUIET, weights, write_plain

LAYER = "model.layers.1."
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("dense") / "model")


def _experts(found: dict[str, Tensor], matrix: str, count: int) -> list[Tensor]:
    own = f"{LAYER}block_sparse_moe.experts."
    return [found[f"{own}{e}.{MIXTRAL[matrix]}.weight"] for e in range(count)]


def _converted(dense: Path, target: Path, **settings: Any) -> dict[str, Tensor]:
    wanted = {"experts": 4, "top_k": 2, **settings}
    upcycle(dense, target, UpcycleConfig(**wanted), options=QUIET)
    return weights(target)


def test_shards_put_together_are_the_dense_matrix_bit_for_bit(dense: Path, tmp_path: Path) -> None:
    found = _converted(
        dense, tmp_path / "moe", method="virtual-group", granularity=2, scaling="none"
    )
    for m in MATRICES:
        shards = _experts(found, m, 4)
        whole = weights(dense)[f"{LAYER}mlp.{m}_proj.weight"]
        assert torch.equal(torch.cat(shards[:2], NEURONS[m]), whole)
        assert torch.equal(torch.cat(shards[2:], NEURONS[m]), whole)
    rows = found[f"{LAYER}block_sparse_moe.gate.weight"]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    assert not torch.equal(rows[1], rows[2])


def test_shared_and_routed_shards_are_the_dense_matrix(dense: Path, tmp_path: Path) -> None:
    settings = {"granularity": 4, "shared_experts": 2, "scaling": "none"}
    found = _converted(dense, tmp_path / "moe", method="virtual-group", **settings)
    for m in MATRICES:
        shared = found[f"{LAYER}mlp.shared_expert.{m}_proj.weight"] / (2 if m == "down" else 1)
        routed = [found[f"{LAYER}mlp.experts.{e}.{m}_proj.weight"] for e in (0, 1)]
        whole = weights(dense)[f"{LAYER}mlp.{m}_proj.weight"]
        assert torch.equal(torch.cat([shared, *routed], NEURONS[m]), whole)


def test_everything_but_the_ffn_is_left_as_it_is(dense: Path, tmp_path: Path) -> None:
    found = _converted(dense, tmp_path / "moe", method="drop")
    for name, tensor in weights(dense).items():
        assert ".mlp." in name or torch.equal(found[name], tensor)


def test_equal_seeds_give_equal_bytes_and_others_do_not(dense: Path, tmp_path: Path) -> None:
    for method in ("drop", "noise"):
        made = [
            _converted(dense, tmp_path / f"{method}-{n}", method=method, seed=seed)
            for n, seed in enumerate((7, 7, 8))
        ]
        assert all(torch.equal(t, made[1][name]) for name, t in made[0].items())
        name = f"{LAYER}block_sparse_moe.experts.0.w1.weight"
        assert not torch.equal(made[0][name], made[2][name])


def test_a_dropped_neuron_goes_from_all_three_matrices(dense: Path, tmp_path: Path) -> None:
    found = _converted(dense, tmp_path / "moe", method="drop", fraction=0.25)
    changed = []
    for m in MATRICES:
        whole = weights(dense)[f"{LAYER}mlp.{m}_proj.weight"]
        differs = (_experts(found, m, 4)[2] != whole).any(dim=1 - NEURONS[m])
        changed.append(differs.nonzero().flatten().tolist())
    assert len(changed[0]) == 8  # a quarter of 32
    assert changed[0] == changed[1] == changed[2]


@pytest.mark.parametrize(("scope", "same"), [("neuron", True), ("matrix", False)])
def test_the_scope_decides_whether_matrices_share_a_choice(scope: DropScope, same: bool) -> None:
    config = UpcycleConfig(4, 2, method="drop", drop_scope=scope)
    gate, down = (dropped_neurons(config, 64, 0, 1, m) for m in ("gate", "down"))
    assert torch.equal(gate, down) == same
    assert not torch.equal(gate, dropped_neurons(config, 64, 0, 2, "gate"))


def test_redrawn_weights_have_the_mean_and_deviation_of_the_old() -> None:
    w = torch.randn(400, 100, generator=generator(0)) * 0.3 + 0.1
    neurons = torch.arange(0, 400, 2)
    new = redraw(w, neurons, 0, generator(1))
    assert torch.equal(new[1::2], w[1::2])
    assert new[::2].mean().item() == pytest.approx(w[::2].mean().item(), abs=0.01)
    assert new[::2].std().item() == pytest.approx(w[::2].std().item(), rel=0.02)


def test_noise_is_as_large_as_asked_and_leaves_its_input_alone() -> None:
    w = torch.randn(200, 200, generator=generator(0)) * 0.3
    before = w.clone()
    noise = add_noise(w, 0.1, generator(1)) - w
    assert noise.std().item() == pytest.approx(0.03, rel=0.03)
    assert torch.equal(w, before)


def test_branches_become_experts_and_all_else_their_mean(dense: Path, tmp_path: Path) -> None:
    other = write_plain(tmp_path / "other")
    doubled = {name: tensor * 3 for name, tensor in weights(other).items()}
    save_file(doubled, other / "model.safetensors", metadata={"format": "pt"})
    config = UpcycleConfig(4, 2, method="branch-train-mix")
    upcycle(dense, tmp_path / "moe", config, [other], QUIET)
    found = weights(tmp_path / "moe")
    whole = weights(dense)
    name = f"{LAYER}self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], whole[name] * 2)
    up = whole[f"{LAYER}mlp.up_proj.weight"]
    for e, expert in enumerate(_experts(found, "up", 4)):
        assert torch.equal(expert, up * 3 if e % 2 else up)
