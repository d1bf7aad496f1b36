"""The first weights of routers: drawn or measured per replica, and tied over its shards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moe.config import RouterConfig
from moe.router import route
from moe.upcycling.config import UpcycleConfig
from moe.upcycling.methods import generator

__all__ = ["centroids", "first_rows", "mean_mass", "split_groups", "tied"]

ROUNDS = 10


def first_rows(config: UpcycleConfig, hidden: int, layer: int, inputs: Tensor | None) -> Tensor:
    """Return one router row per replica, float32 of shape (E, D).

    - ``normal``: N(0, std^2); ``uniform``: U(-sqrt(3) std, sqrt(3) std), which has the same std.
    - ``centroid``: `centroids` of the FFN's inputs, of length std * sqrt(D).

    Args:
        config: of the upcycling.
        hidden: D.
        layer: whose router it is.
        inputs: of the layer's FFN, of shape (tokens, D); only looked at for ``centroid``.
    """
    draw = generator(config.seed, "router", layer)
    shape = (config.replicas, hidden)
    if config.router_init == "centroid" and inputs is not None:
        return centroids(inputs, config.replicas, draw) * (config.router_std * hidden**0.5)
    if config.router_init == "uniform":
        bound = 3**0.5 * config.router_std
        return torch.empty(shape).uniform_(-bound, bound, generator=draw)
    return torch.empty(shape).normal_(std=config.router_std, generator=draw)


def tied(rows: Tensor, routed_shards: int) -> Tensor:
    """Repeat each replica's row for all its shards: [r0] * R, [r1] * R, ...

    The experts of a replica then tie in every logit. A choice that breaks ties towards lower
    numbers takes them together, so that a token gets each shard of the dense FFN equally often.

    Args:
        rows: shape (E, D).
        routed_shards: R.

    Example:
        >>> tied(torch.tensor([[1.0], [2.0]]), 2).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    return rows.repeat_interleave(routed_shards, dim=0)


def centroids(inputs: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Return unit vectors around which the inputs' directions lie: spherical k-means.

    Args:
        inputs: shape (tokens, D), at least `count` of them.
        count: how many centroids.
        draw: chooses the tokens that they start from.
    """
    x_TD = functional.normalize(inputs.float(), dim=1)
    start = torch.randperm(len(x_TD), generator=draw)[:count]
    means_ED = x_TD[start.repeat(count)[:count]].clone()
    for _ in range(ROUNDS):
        nearest_T = (x_TD @ means_ED.T).argmax(dim=1)
        sums_ED = torch.zeros_like(means_ED).index_add_(0, nearest_T, x_TD)
        empty_E = torch.bincount(nearest_T, minlength=count) == 0
        means_ED = torch.where(empty_E[:, None], means_ED, functional.normalize(sums_ED, dim=1))
    return means_ED


def mean_mass(config: UpcycleConfig, inputs: Tensor, rows: Tensor) -> float:
    """Return the mean over tokens of M, the sum of a token's top-k probabilities.

    Args:
        config: of the upcycling.
        inputs: of the layer's FFN, shape (tokens, D).
        rows: of the router, shape (N, D).
    """
    routing = route(inputs.float() @ rows.float().T, RouterConfig(config.experts, config.top_k))
    return float(routing.weights_TK.sum(dim=1).mean())


def split_groups(chosen_TK: Tensor, routed_shards: int) -> int:
    """Count the tokens that do not get every shard equally often.

    Args:
        chosen_TK: chosen experts.
        routed_shards: R.

    Example:
        >>> split_groups(torch.tensor([[0, 1], [1, 2], [0, 2]]), 2)
        1
    """
    shares = functional.one_hot(chosen_TK % routed_shards, routed_shards).sum(dim=1)
    return int((shares != shares[:, :1]).any(dim=1).sum())
