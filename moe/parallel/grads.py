"""Gradients over both mappings: who adds them up, and how long they are together.

Each rank's loss is the mean over the tokens of its (dp, cp) part; a rank of the TP group holds a
piece of that part, hence a piece of the gradient. The loss of the whole batch is the mean over the
DP x CP parts, so that for every family

    gradient = 1 / (DP * CP) * sum over the ranks that hold a copy of the parameter

| family     | what it is                                      | a copy on each rank of |
|------------|-------------------------------------------------|------------------------|
| dense      | sharded over TP, such as attention projections  | DP x CP                |
| expert     | sharded over ETP x EP                           | EDP                    |
| router     | whole on every rank of the stage                | TP x CP x DP           |
| replicated | likewise: norms, shared experts                 | TP x CP x DP           |

Dispatch has already summed an expert's gradient over the tokens of its ETP x EP block; dividing it
by EDP, as if it were a dense one, is the error that four other code bases made.

A model tells the family of each parameter by name; nothing is hidden in attributes of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from moe.errors import LayoutError
from moe.parallel.collectives import all_reduce_sum
from moe.parallel.groups import ProcessGroups

__all__ = [
    "Family",
    "GradientRegistry",
    "clip_grad_norm_",
    "grad_norm",
    "reduce_gradients",
]

BUCKET_BYTES = 64 * 2**20


class Family(Enum):
    """Parameters whose gradients are reduced alike."""

    DENSE = "dense"
    EXPERT = "expert"
    ROUTER = "router"
    REPLICATED = "replicated"

    @property
    def group(self) -> str:
        """Name of the group whose ranks each hold a copy of the parameter."""
        return {Family.DENSE: "dp_cp", Family.EXPERT: "edp"}.get(self, "stage")


@dataclass(frozen=True)
class GradientRegistry:
    """Which parameters there are, and the family of each.

    Args:
        entries: name, parameter and family, in the same order on every rank.
    """

    entries: tuple[tuple[str, nn.Parameter, Family], ...]

    @classmethod
    def of(
        cls,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        families: Mapping[str, Family],
    ) -> GradientRegistry:
        """Give every parameter that is trained its family.

        Args:
            named_parameters: such as ``model.named_parameters()``.
            families: by name; such as ``layer.families()``.

        Raises:
            LayoutError: a parameter has no family, or a family no parameter.

        Example:
            >>> layer = nn.Linear(2, 2, bias=False)
            >>> registry = GradientRegistry.of(layer.named_parameters(), {"weight": Family.DENSE})
            >>> [(name, family.name) for name, _, family in registry.entries]
            [('weight', 'DENSE')]
        """
        named = dict(named_parameters)
        homeless, unknown = sorted(set(named) - set(families)), sorted(set(families) - set(named))
        if homeless or unknown:
            raise LayoutError(
                f"families do not fit the parameters: none was given for {homeless}, and there are "
                f"no parameters {unknown}"
            )
        return cls(tuple((n, p, families[n]) for n, p in named.items() if p.requires_grad))

    def of_family(self, family: Family) -> list[nn.Parameter]:
        """Return the parameters of a family."""
        return [parameter for _, parameter, own in self.entries if own is family]


@torch.no_grad()
def reduce_gradients(
    registry: GradientRegistry, groups: ProcessGroups, *, scale: float | None = None
) -> None:
    """Replace each rank's gradients by those of the whole batch.

    A parameter without a gradient gets one of zeros, so that all ranks reduce, and step, alike.
    Gradients in half precision are added in float32.

    Args:
        registry: of this rank's parameters.
        groups: of the mapping.
        scale: factor on the sums; 1 / (DP * CP) unless the loss is not a mean over each part, such
            as 1 / (tokens of the batch) for a loss that is a sum over tokens.
    """
    factor = 1.0 / (groups.dims.dp * groups.dims.cp) if scale is None else scale
    for family in Family:
        group = groups[family.group]
        for bucket in _buckets(registry.of_family(family)):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            exact = flat.to(torch.promote_types(flat.dtype, torch.float32))
            total = all_reduce_sum(exact, group) * factor
            parts = total.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def grad_norm(registry: GradientRegistry, groups: ProcessGroups) -> Tensor:
    """Return the Euclidean norm of the gradient of the whole model, the same on every rank.

    Every rank adds the squares of what it holds, divided by how many ranks hold the same; one sum
    over the world, stages of the pipeline included, makes each coordinate count once.

    Args:
        registry: of this rank's parameters, with gradients that were reduced.
        groups: of the mapping.

    Returns:
        float64 scalar.
    """
    device = next((p.device for _, p, _ in registry.entries), torch.device("cpu"))
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for _, parameter, family in registry.entries:
        if parameter.grad is not None:
            exact = torch.promote_types(parameter.grad.dtype, torch.float32)
            norm = torch.linalg.vector_norm(parameter.grad, dtype=exact).double()
            squares += norm.square() / groups[family.group].size
    return all_reduce_sum(squares, groups["world"]).sqrt()


@torch.no_grad()
def clip_grad_norm_(registry: GradientRegistry, groups: ProcessGroups, max_norm: float) -> Tensor:
    """Scale all gradients so that the norm of the whole model's is at most `max_norm`.

    Args:
        registry: of this rank's parameters, with gradients that were reduced.
        groups: of the mapping.
        max_norm: the bound.

    Returns:
        The norm before. Where it is not finite, on every rank, the gradients are left as they are:
        look at it before the optimizer's step.
    """
    norm = grad_norm(registry, groups)
    factor = torch.where((norm > max_norm) & norm.isfinite(), max_norm / norm, 1.0)
    for _, parameter, _ in registry.entries:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield gradients of the same type together, a bounded number of bytes at a time."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        bucket: list[Tensor] = []
        held_bytes = 0
        for gradient in gradients:
            if bucket and held_bytes + gradient.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, held_bytes = [], 0
            bucket.append(gradient)
            held_bytes += gradient.nbytes
        yield bucket
