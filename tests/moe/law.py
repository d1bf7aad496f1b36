"""The law of the package: every legal mapping gives the one-rank result. What each rank checks.

The batch of a pipeline stage is DP micro-batches of a few sequences; a rank gets its piece of each
sequence of one of them. The one-rank run sees the micro-batches whole, the loss is the mean over
all tokens of <y, c> with random c, plus the auxiliary losses. Expected and actual values are
compared by the largest difference over the largest expected value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import CapacityConfig, ExpertConfig, LossConfig, MoeConfig, RouterConfig
from moe.experts import shard_experts
from moe.layer import Execution, MoeLayer
from moe.parallel.dims import ParallelDims
from moe.parallel.grads import GradientRegistry, clip_grad_norm_, grad_norm, reduce_gradients
from moe.parallel.groups import ProcessGroups, build_groups

__all__ = ["CASES", "Case", "violations"]

EXPERTS, HIDDEN, INNER = 8, 8, 16
RTOL = 1e-5
STEP = 0.5


@dataclass(frozen=True)
class Case:
    """One setting of the layer, to be tried under many mappings."""

    router: RouterConfig
    experts: ExpertConfig = field(default_factory=lambda: ExpertConfig(HIDDEN, INNER))
    losses: LossConfig = field(default_factory=LossConfig)
    capacity: CapacityConfig | None = None
    execution: Execution = field(default_factory=Execution)
    sequences: int = 2
    lengths: Callable[[int], int] = lambda rank: 3
    masked: bool = False

    @property
    def config(self) -> MoeConfig:
        return MoeConfig(self.router, self.experts, self.losses, self.capacity)


def _ragged(rank: int) -> int:
    return (0, 5, 1, 4, 0, 2, 7, 3)[rank % 8]


TOP2 = RouterConfig(EXPERTS, 2, renormalise=True)
GROUPED = RouterConfig(EXPERTS, 3, score="sigmoid", groups=(4, 3), expert_bias=True, scale=2.0)
PLAIN = ExpertConfig(HIDDEN, INNER, activation="squared_relu")
SHARED = ExpertConfig(HIDDEN, INNER, shared=4, shared_gate=True)

CASES = {
    "dropless": Case(TOP2, losses=LossConfig(balance=0.3, z=0.1)),
    "gathered": Case(TOP2, execution=Execution("allgather"), lengths=_ragged, sequences=1),
    "ragged": Case(
        RouterConfig(EXPERTS, 3, score="topk-softmax"),
        PLAIN,
        LossConfig(balance=0.3, scope="global", z=0.1),
        lengths=_ragged,
        sequences=1,
    ),
    "full-sequence": Case(
        TOP2,
        losses=LossConfig(balance=0.3, scope="sequence"),
        capacity=CapacityConfig(0.7, "full-sequence", "probability"),
        execution=Execution(weights_travel=True),
    ),
    "full-sequence by position": Case(
        TOP2,
        PLAIN,
        capacity=CapacityConfig(0.7, "full-sequence", "position", pad=True),
        masked=True,
    ),
    "sub-sequence": Case(
        TOP2,
        losses=LossConfig(balance=0.3, z=0.1),
        capacity=CapacityConfig(0.7, "sub-sequence", "probability", pad=True),
        execution=Execution(recompute="experts"),
    ),
    "sub-sequence by position": Case(
        TOP2, capacity=CapacityConfig(9.0, "sub-sequence", "position", pad=True)
    ),
    "all at once": Case(
        GROUPED,
        SHARED,
        LossConfig(balance=0.3, scope="sequence", z=0.1),
        execution=Execution(weights_travel=True, halves=True, recompute="layer"),
        masked=True,
    ),
}


@dataclass(frozen=True)
class Batch:
    """Everything a pipeline stage works on."""

    x: list[Tensor]
    """For each micro-batch, shape (sequences, tokens, hidden)."""

    c: list[Tensor]
    """Factors of the loss, likewise."""

    valid: list[Tensor]
    """True for real tokens, shape (sequences, tokens)."""

    pieces: list[list[slice]]
    """Which tokens of a micro-batch's sequences each of its ranks has."""

    @property
    def tokens(self) -> int:
        return max(1, sum(x[..., 0].numel() for x in self.x))


@dataclass(frozen=True)
class Expected:
    """What one rank computes for a stage."""

    y: list[Tensor]
    grad_x: list[Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    losses: dict[str, Tensor]
    counts_E: Tensor
    dropped: Tensor


@cache
def _batch(case_name: str, stage: int, dp: int, pieces: int) -> Batch:
    case = CASES[case_name]
    generator = torch.Generator().manual_seed(1000 + stage)
    # tokens that lean to one side, so that some experts get many and some none
    lean = torch.randn(HIDDEN, generator=generator)
    batch = Batch([], [], [], [])
    for replica in range(dp):
        lengths = [case.lengths(replica * pieces + i) for i in range(pieces)]
        shape = case.sequences, sum(lengths), HIDDEN
        batch.x.append(torch.randn(shape, generator=generator) + 0.7 * lean)
        batch.c.append(torch.randn(shape, generator=generator))
        batch.valid.append(torch.rand(shape[:2], generator=generator) > 0.25 * case.masked)
        ends = accumulate(lengths, initial=0)
        batch.pieces.append([slice(*ends_of) for ends_of in pairwise(ends)])
    return batch


def _mask(case: Case, valid: Tensor) -> Tensor | None:
    return valid if case.masked else None


@cache
def _expected(case_name: str, stage: int, dp: int, pieces: int) -> Expected:
    case, batch = CASES[case_name], _batch(case_name, stage, dp, pieces)
    layer = MoeLayer(case.config, seed=stage)
    capacity = case.capacity
    chunked = capacity is not None and capacity.scope == "sub-sequence"
    xs = [x.clone().requires_grad_() for x in batch.x]
    total: Tensor = torch.zeros(())
    ys, losses = [], dict.fromkeys(("balance", "z"), torch.zeros(()))
    counts_E, dropped = torch.zeros(EXPERTS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    for x, c, valid, cuts in zip(xs, batch.c, batch.valid, batch.pieces, strict=True):
        chunks = cuts if chunked else [slice(None)]
        outs = [layer(x[:, cut], _mask(case, valid[:, cut])) for cut in chunks]
        y = torch.cat([out.y for out in outs], dim=1)
        ys.append(y.detach())
        total = total + (y * c).sum() / batch.tokens
        counts_E = counts_E + torch.stack([out.counts_E for out in outs]).sum(0)
        dropped = dropped + torch.stack([out.dropped for out in outs]).sum()
    for name, loss in _losses(case, layer, xs, batch.valid):
        losses[name] = losses[name] + loss
        total = total + loss
    total.backward()
    gradients = {name: _gradient(p) for name, p in layer.named_parameters()}
    return Expected(
        y=ys,
        grad_x=[_gradient(x) for x in xs],
        gradients=gradients,
        weights={name: p.detach() for name, p in layer.named_parameters()},
        losses={name: loss.detach() for name, loss in losses.items()},
        counts_E=counts_E,
        dropped=dropped,
    )


def _losses(
    case: Case, layer: MoeLayer, xs: list[Tensor], valids: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the auxiliary losses: of all tokens at once, or the mean over the micro-batches."""
    if case.losses.scope == "global":
        together = torch.cat([x.flatten(0, 1) for x in xs])
        valid = torch.cat([v.flatten() for v in valids])
        yield from layer(together, _mask(case, valid)).losses.items()
        return
    for x, valid in zip(xs, valids, strict=True):
        for name, loss in layer(x, _mask(case, valid)).losses.items():
            yield name, loss / len(xs)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def violations(dims: ParallelDims, case_names: tuple[str, ...]) -> list[str]:
    """Return what differs from the one-rank run on this rank, under one mapping."""
    groups = build_groups(dims)
    try:
        return [
            f"{dims} {name}: {found}" for name in case_names for found in _Run(groups, name).check()
        ]
    finally:
        groups.close()


class _Run:
    """One case under one mapping, on one rank."""

    def __init__(self, groups: ProcessGroups, name: str) -> None:
        self.groups, self.case = groups, CASES[name]
        dims, own = groups.dims, groups.dims.coordinates(groups.rank)
        key = name, own["pp"], dims.dp, dims.cp * dims.tp
        self.batch, self.expected = _batch(*key), _expected(*key)
        self.replica = own["dp"]
        self.cut = self.batch.pieces[own["dp"]][own["cp"] * dims.tp + own["tp"]]
        self.layer = MoeLayer(self.case.config, groups, self.case.execution, seed=own["pp"])

    def check(self) -> list[str]:
        return [
            f"{what} is off by {off:.1e}"
            for what, actual, expected in self._pairs()
            if (off := _difference(actual, expected)) > RTOL
        ]

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        dims, expected, replica = self.groups.dims, self.expected, self.replica
        x = self.batch.x[replica][:, self.cut].clone().requires_grad_()
        out = self.layer(x, _mask(self.case, self.batch.valid[replica][:, self.cut]))
        yield "y", out.y, expected.y[replica][:, self.cut]
        yield "counts", self._summed(out.counts_E), expected.counts_E
        yield "dropped", self._summed(out.dropped), expected.dropped
        for name, share in out.losses.items():
            yield f"loss {name}", self._summed(share), expected.losses[name]

        # mean over the (dp, cp) part, were all of them equally long
        scale = dims.dp * dims.cp / self.batch.tokens
        loss = (out.y * self.batch.c[replica][:, self.cut]).sum() * scale
        self.layer.total_loss(loss, out).backward()
        mean = _gradient(x) / (dims.dp * dims.cp)
        yield "gradient of x", mean, expected.grad_x[replica][:, self.cut]
        registry = GradientRegistry.of(self.layer.named_parameters(), self.layer.families())
        reduce_gradients(registry, self.groups)
        for name, parameter in self.layer.named_parameters():
            full = expected.gradients[name]
            yield f"gradient of {name}", _gradient(parameter), self._shard(name, full)

        norm = self._expected_norm()
        yield "norm", grad_norm(registry, self.groups), norm
        yield "norm before clipping", clip_grad_norm_(registry, self.groups, float(norm) / 2), norm
        torch.optim.SGD(self.layer.parameters(), lr=STEP).step()
        for name, parameter in self.layer.named_parameters():
            stepped = expected.weights[name] - STEP * expected.gradients[name] / 2
            yield f"{name} after a step", parameter, self._shard(name, stepped)

    def _summed(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        if self.groups["stage"].size > 1:
            dist.all_reduce(total, group=self.groups["stage"].handle)
        return total

    def _shard(self, name: str, full: Tensor) -> Tensor:
        module, _, own_name = name.partition(".")
        if module != "experts":
            return full
        local, etp = self.layer.experts.w_in_LDG.shape[0], self.groups["etp"]
        first = self.groups["ep"].index * local
        mine = range(first, first + local)
        return shard_experts(full, own_name, self.case.experts, mine, etp.size, etp.index)

    def _expected_norm(self) -> Tensor:
        """Return the norm over all stages, each of which only its own ranks know."""
        squares = sum(g.double().square().sum() for g in self.expected.gradients.values())
        everyone = squares / self.groups.dims.stage
        dist.all_reduce(everyone)
        return everyone.sqrt()


def _difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{actual.shape} for {expected.shape}"
    if not expected.numel():
        return 0.0
    largest = expected.abs().max().double().clamp_min(1e-12)
    difference = (actual.detach().double() - expected.double()).abs().max() / largest
    return float(difference.nan_to_num(float("inf")))
