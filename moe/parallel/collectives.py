"""Collectives over rows, with gradients; each does nothing in a group of one.

Rows are the first dimension; how many each rank has may differ and may be zero, so every call takes
the counts, which all ranks of the group know already. Forward and backward are pairs:

    all_to_all_rows       <->  all_to_all_rows with the counts exchanged
    all_gather_rows       <->  reduce_scatter_rows
    all_reduce_sum        <->  all_reduce_sum

which are the gradients of the *sum of all ranks' losses*. All of them but the last are built on one
primitive, the uneven all-to-all, because gloo has no uneven all-gather; the bytes between any two
ranks are the same. What is summed is summed in the order of the ranks, in float32 at least, hence
with the same bits every time.

`start_all_to_all_rows` returns before the rows are there: what is computed until `Pending.wait`
runs while they travel, and so does, in the backward pass, what stood between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.errors import CollectiveError
from moe.parallel.groups import Group

__all__ = [
    "Pending",
    "all_gather_rows",
    "all_reduce_largest",
    "all_reduce_sum",
    "all_to_all_rows",
    "exchange_counts",
    "gather_counts",
    "largest",
    "reduce_scatter_rows",
    "start_all_to_all_rows",
    "start_shift",
]

Result = TypeVar("Result")
Next = TypeVar("Next")


class Pending(Generic[Result]):
    """Something on its way; `wait` is called exactly once."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish = finish

    def wait(self) -> Result:
        """Return what was awaited."""
        return self._finish()

    def then(self, work: Callable[[Result], Next]) -> Pending[Next]:
        """Return the result of further work, which is done when that is awaited."""
        return Pending(lambda: work(self._finish()))


def all_to_all_rows(
    x_ND: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: Group
) -> Tensor:
    """Send consecutive rows to each rank of a group, and return those received, by rank.

    Args:
        x_ND: rows, those for the group's first rank first.
        send_counts: rows for each rank of the group.
        receive_counts: rows that each rank of the group has for this one.
        group: who takes part.

    Returns:
        sum(receive_counts) rows, those of the group's first rank first.

    Raises:
        CollectiveError: the counts do not fit the rows, or another rank failed.
    """
    return start_all_to_all_rows(x_ND, send_counts, receive_counts, group).wait()


def start_all_to_all_rows(
    x_ND: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: Group
) -> Pending[Tensor]:
    """Begin `all_to_all_rows`; the rows are there after `Pending.wait`."""
    _check_counts("all-to-all", x_ND, send_counts, group)
    if group.size == 1:
        return Pending(lambda: x_ND)
    flight = _Flight(group, list(send_counts), list(receive_counts))
    ticket: Tensor = _Start.apply(x_ND, flight)
    return Pending(lambda: _Finish.apply(ticket, flight))


def all_gather_rows(x_ND: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Return the rows of all ranks of a group, in the order of the ranks.

    Args:
        x_ND: counts[index] rows of this rank.
        counts: rows of each rank of the group.
        group: who takes part.

    Raises:
        CollectiveError: the counts do not fit the rows, or another rank failed.
    """
    if group.size == 1:
        return x_ND
    if len(counts) != group.size or len(x_ND) != counts[group.index]:
        raise CollectiveError(
            f"all-gather of {len(x_ND)} rows as number {group.index} of counts {list(counts)}"
        )
    gathered: Tensor = _Gather.apply(x_ND, list(counts), group)
    return gathered


def reduce_scatter_rows(x_ND: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Return this rank's rows of the sum over all ranks of a group.

    Args:
        x_ND: sum(counts) rows, those that the group's first rank will get first.
        counts: rows that each rank of the group gets.
        group: who takes part.

    Raises:
        CollectiveError: the counts do not fit the rows, or another rank failed.
    """
    _check_counts("reduce-scatter", x_ND, counts, group)
    if group.size == 1:
        return x_ND
    scattered: Tensor = _Scatter.apply(x_ND, list(counts), group)
    return scattered


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Return the sum of a tensor over the ranks of a group, as a new tensor.

    Args:
        x: of the same shape on every rank.
        group: who takes part.

    Raises:
        CollectiveError: another rank failed.
    """
    if group.size == 1:
        return x
    total: Tensor = _Reduce.apply(x, group)
    return total


def start_shift(tensors: Sequence[Tensor], group: Group) -> Pending[list[Tensor]]:
    """Begin to pass tensors to the next rank of a group, the last one to the first.

    Args:
        tensors: of the same shapes and types on every rank; must not change until they have gone.
        group: who takes part.

    Returns:
        What the rank before this one has passed on. Without a gradient of its own.

    Raises:
        CollectiveError: another rank failed.
    """
    sent = [x.contiguous() for x in tensors]
    if group.size == 1:
        return Pending(lambda: sent)
    received = [torch.empty_like(x) for x in sent]
    to, by = (group.ranks[(group.index + way) % group.size] for way in (1, -1))
    moves = [dist.P2POp(dist.isend, x, to, group.handle) for x in sent]
    moves += [dist.P2POp(dist.irecv, x, by, group.handle) for x in received]
    works = _run(group, lambda: dist.batch_isend_irecv(moves))

    def land() -> list[Tensor]:
        for work in works:
            _run(group, work.wait)
        sent.clear()  # what is sent has to outlive the sending
        return received

    return Pending(land)


@torch.no_grad()
def all_reduce_largest(x: Tensor, group: Group) -> Tensor:
    """Return, place by place, the largest of the tensors of all ranks; without a gradient.

    Args:
        x: of the same shape on every rank.
        group: who takes part.

    Raises:
        CollectiveError: another rank failed.
    """
    if group.size == 1:
        return x
    top = x.clone(memory_format=torch.contiguous_format)
    _run(group, lambda: dist.all_reduce(top, dist.ReduceOp.MAX, group=group.handle))
    return top


def exchange_counts(counts_RL: Tensor, group: Group) -> Tensor:
    """Send row r of a table of counts to rank r of the group; return the table received.

    Args:
        counts_RL: int64, a row for each rank of the group.
        group: who takes part.
    """
    if group.size == 1:
        return counts_RL
    received = torch.empty_like(counts_RL)
    table = counts_RL.contiguous()
    _run(group, lambda: dist.all_to_all_single(received, table, group=group.handle))
    return received


def gather_counts(counts: Tensor, group: Group) -> Tensor:
    """Return the tables of all ranks of a group, stacked in the order of the ranks."""
    if group.size == 1:
        return counts[None]
    tables = [torch.empty_like(counts) for _ in range(group.size)]
    _run(group, lambda: dist.all_gather(tables, counts.contiguous(), group=group.handle))
    return torch.stack(tables)


def largest(numbers: Sequence[int], group: Group, device: torch.device) -> list[int]:
    """Return, place by place, the largest of the numbers of all ranks of a group.

    Args:
        numbers: as many on every rank; each fits into int64.
        group: who takes part.
        device: where the group's collectives want their tensors.
    """
    if group.size == 1:
        return list(numbers)
    told = torch.tensor(numbers, dtype=torch.int64, device=device)
    _run(group, lambda: dist.all_reduce(told, dist.ReduceOp.MAX, group=group.handle))
    found: list[int] = told.tolist()
    return found


class _Flight:
    """One uneven all-to-all and, in the backward pass, the one that brings the gradient back."""

    def __init__(self, group: Group, send_counts: list[int], receive_counts: list[int]) -> None:
        self.group = group
        self.send_counts = send_counts
        self.receive_counts = receive_counts
        self._aboard: tuple[dist.Work, Tensor, Tensor] | None = None

    def begin(self, x_ND: Tensor, *, back: bool = False) -> None:
        """Start sending rows, or gradients back."""
        send, receive = self.send_counts, self.receive_counts
        if back:
            send, receive = receive, send
        received = x_ND.new_empty((sum(receive), *x_ND.shape[1:]))
        rows, handle = x_ND.contiguous(), self.group.handle
        work = _run(
            self.group,
            lambda: dist.all_to_all_single(
                received, rows, receive, send, group=handle, async_op=True
            ),
        )
        assert work is not None
        self._aboard = work, received, rows  # what is sent has to outlive the sending

    def land(self) -> Tensor:
        """Wait for what `begin` had sent here, and return it."""
        assert self._aboard is not None, "a pending all-to-all is awaited once"
        work, received, _ = self._aboard
        self._aboard = None
        _run(self.group, work.wait)
        return received


class _Start(torch.autograd.Function):
    """Rows to a ticket: it makes autograd come back here after `_Finish`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.begin(x_ND)
        return x_ND.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.flight.begin(gradient, back=True)
        return gradient.new_zeros(()), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _gather(x_ND, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(gradient, ctx.counts, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _scatter(x_ND, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.counts, ctx.group), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce(gradient, ctx.group), None


def _gather(x_ND: Tensor, counts: list[int], group: Group) -> Tensor:
    own = [len(x_ND)] * group.size
    copies = x_ND.repeat(group.size, *[1] * (x_ND.dim() - 1))
    flight = _Flight(group, own, counts)
    flight.begin(copies)
    return flight.land()


def _scatter(x_ND: Tensor, counts: list[int], group: Group) -> Tensor:
    own = counts[group.index]
    flight = _Flight(group, counts, [own] * group.size)
    flight.begin(x_ND)
    parts = flight.land()
    exact = torch.promote_types(parts.dtype, torch.float32)
    return parts.view(group.size, own, *x_ND.shape[1:]).sum(0, dtype=exact).to(parts.dtype)


def _reduce(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    _run(group, lambda: dist.all_reduce(total, group=group.handle))
    return total


def _check_counts(what: str, x_ND: Tensor, counts: Sequence[int], group: Group) -> None:
    if len(counts) != group.size or sum(counts) != len(x_ND):
        raise CollectiveError(
            f"{what} of {len(x_ND)} rows among {group.size} ranks with counts {list(counts)}"
        )


def _run(group: Group, collective: Callable[[], Result]) -> Result:
    """Run a collective; say who took part if it fails."""
    try:
        return collective()
    except RuntimeError as error:
        raise CollectiveError(
            f"a collective among ranks {list(group.ranks)} failed on rank "
            f"{group.ranks[group.index]}; another rank ended or does not answer: {error}"
        ) from error
