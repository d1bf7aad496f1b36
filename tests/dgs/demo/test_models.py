"""The demonstration's networks: sizes and shapes."""

from __future__ import annotations

import pytest
import torch

from dgs.demo.models import digits_net, num_parameters, resnet18


def test_digits_net_is_small_enough_for_a_cpu_and_large_enough_for_one_percent() -> None:
    by_hand = 9 * 16 + 2 * 16 + 9 * 16 * 32 + 2 * 32 + (512 + 1) * 112 + (112 + 1) * 10
    assert num_parameters(digits_net()) == by_hand == 63_434


def test_resnet18_has_the_usual_number_of_parameters() -> None:
    assert num_parameters(resnet18()) == 11_173_962


@pytest.mark.parametrize(
    ("model", "shape"), [(digits_net(), (2, 1, 8, 8)), (resnet18(), (2, 3, 32, 32))], ids=["d", "r"]
)
def test_networks_give_ten_scores_per_image(
    model: torch.nn.Sequential, shape: tuple[int, ...]
) -> None:
    assert model(torch.zeros(shape)).shape == (2, 10)


@pytest.mark.parametrize(("model", "norms"), [(digits_net(), 2), (resnet18(), 20)], ids=["d", "r"])
def test_networks_have_statistics_that_must_be_averaged(
    model: torch.nn.Sequential, norms: int
) -> None:
    floats = [name for name, b in model.named_buffers() if b.is_floating_point()]
    assert len(floats) == 2 * norms


def test_resnet18_shrinks_images_three_times() -> None:
    before_pooling = resnet18()[:-3]
    assert before_pooling(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)
