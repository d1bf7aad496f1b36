"""First weights that do not depend on the mapping.

Every expert is drawn whole from a generator of its own and then cut, so that the same seed gives
the same model on one rank and on a thousand (on the same type of device).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe.config import ExpertConfig
from moe.experts import Experts, shard_experts
from moe.parallel.groups import Group

__all__ = ["derived_seed", "draw_experts", "draw_part", "draw_replicated"]


@torch.no_grad()
def draw_experts(experts: Experts, first_expert: int, seed: int) -> None:
    """Draw the weights of a rank's experts, each normal with variance 1 / (width of its input).

    Args:
        experts: this rank's.
        first_expert: number of the first of them.
        seed: the same on every rank.
    """
    config = experts.config
    for name, weight in experts.named_parameters():
        for local in range(weight.shape[0]):
            full = weight.new_empty(_whole(config, name))
            _draw(full, full.shape[1], f"{seed}/{name}/{first_expert + local}")
            part = shard_experts(full, name, config, range(1), experts.etp_size, experts.etp_index)
            weight[local].copy_(part[0])


@torch.no_grad()
def draw_replicated(parameters: Iterator[tuple[str, nn.Parameter]], seed: int) -> None:
    """Draw weights that every rank has whole, likewise.

    Args:
        parameters: by name; the width of the input is the dimension called D or F.
        seed: the same on every rank.
    """
    for name, weight in parameters:
        suffix = name.rpartition("_")[2]
        width = weight.shape[1] if suffix == "ED" else weight.shape[0]
        _draw(weight, width, f"{seed}/{name}")


@torch.no_grad()
def draw_part(
    weight: Tensor, name: str, cut: int | None, group: Group, seed: int, width: int
) -> None:
    """Draw a rank's slice of a weight, normal with variance 1 / width, likewise.

    Args:
        weight: the slice, written in place.
        name: of the weight in the whole model.
        cut: dimension that is cut evenly over the group; None: the rank has the whole.
        group: the ranks that share the weight.
        seed: the same on every rank.
        width: of the input.
    """
    if cut is None or group.size == 1:
        _draw(weight, width, f"{seed}/{name}")
        return
    shape = list(weight.shape)
    part, shape[cut] = shape[cut], shape[cut] * group.size
    full = weight.new_empty(shape)
    _draw(full, width, f"{seed}/{name}")
    weight.copy_(full.narrow(cut, group.index * part, part))


def derived_seed(seed: int, name: str) -> int:
    """Return a seed for a part of a model, another one for each part.

    Args:
        seed: of the model.
        name: of the part.

    Example:
        >>> derived_seed(0, "blocks.0") == derived_seed(0, "blocks.1")
        False
    """
    return _number(f"{seed}/{name}")


def _whole(config: ExpertConfig, name: str) -> tuple[int, int, int]:
    if name == "w_out_LFD":
        return 1, config.intermediate, config.hidden
    return 1, config.hidden, config.intermediate * (2 if config.gated else 1)


def _draw(weight: Tensor, input_width: int, key: str) -> None:
    if weight.is_meta:
        return
    generator = torch.Generator(weight.device).manual_seed(_number(key))
    nn.init.normal_(weight, std=input_width**-0.5, generator=generator)


def _number(key: str) -> int:
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
