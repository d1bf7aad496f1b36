"""An optimizer whose state is spread over the ranks that hold copies of a parameter.

Parameters of a family are laid one after another in *buckets*. Each of the n ranks with a copy owns
an n-th of a bucket: it holds that part's master weights in float32 and the inner optimizer's state
for it, and nobody else does. A step is

    collect     grads += p.grad                     after each backward pass, in float32
    reduce      own part of sum over ranks          reduce-scatter, times 1 / (DP * CP)
    clip        by the norm of the whole model's gradient
    step        inner optimizer on the own part; all-gather; parameters <- masters, rounded

which is what every rank would get by adding up all gradients and stepping all parameters, in an
n-th of the memory. The inner optimizer must treat coordinates one by one, as SGD and Adam do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.errors import CheckpointError, LayoutError
from moe.parallel.collectives import all_gather_rows, all_reduce_sum, reduce_scatter_rows
from moe.parallel.grads import Family, GradientRegistry
from moe.parallel.groups import Group, ProcessGroups

__all__ = ["MASTER", "ShardedOptimizer"]

BUCKET_ENTRIES = 1 << 24
MASTER = "master"
"""Name of the master weights among a parameter's state."""

Groups = list[dict[str, object]]


@dataclass
class _Bucket:
    """Some parameters of one family, one after another, and this rank's part of them."""

    names: list[str]
    parameters: list[nn.Parameter]
    group: Group
    decayed: bool
    grads: Tensor = field(init=False)
    """Of all parameters, padded to a multiple of the group."""
    own: nn.Parameter = field(init=False)
    """This rank's part: master weights."""

    def __post_init__(self) -> None:
        flat = self.padded([p.detach() for p in self.parameters])
        self.grads = torch.zeros_like(flat)
        self.own = nn.Parameter(self.part(flat).clone())

    @property
    def sizes(self) -> list[int]:
        return [p.numel() for p in self.parameters]

    def padded(self, tensors: list[Tensor]) -> Tensor:
        """Lay tensors one after another, in float32."""
        length = sum(t.numel() for t in tensors)
        pad = -length % self.group.size
        parts = [t.reshape(-1).float() for t in tensors]
        return torch.cat([*parts, parts[0].new_zeros(pad)])

    def part(self, flat: Tensor) -> Tensor:
        """Return this rank's part of a padded tensor, as a view."""
        each = len(flat) // self.group.size
        return flat[self.group.index * each : (self.group.index + 1) * each]

    def whole(self, own: Tensor) -> list[Tensor]:
        """Gather the parts of all ranks; return what belongs to each parameter. Collective."""
        flat = all_gather_rows(own, [len(own)] * self.group.size, self.group)
        pieces = flat[: sum(self.sizes)].split(self.sizes)
        return [x.view(p.shape) for x, p in zip(pieces, self.parameters, strict=True)]


class ShardedOptimizer:
    """Step parameters with state that is spread over the ranks with copies of them.

    Args:
        registry: parameters and their families, in the same order on every rank.
        groups: of the mapping.
        build: makes the inner optimizer of parameter groups; the first are decayed, the second,
            with ``weight_decay`` 0, are not.
        decays: which parameters are; those of two and more dimensions unless given.

    Raises:
        LayoutError: nothing is trained on this rank, or a parameter has no dimension.

    Note:
        All methods are collective, and deterministic: gradients are added in the order of the
        ranks.

    Example:
        >>> from moe.parallel.groups import single
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> registry = GradientRegistry.of(layer.named_parameters(), {"weight": Family.DENSE})
        >>> optimizer = ShardedOptimizer(registry, single(), lambda g: torch.optim.SGD(g, lr=0.5))
        >>> nn.init.zeros_(layer.weight)
        Parameter containing:
        tensor([[0., 0.]], requires_grad=True)
        >>> optimizer.refresh()
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.collect()
        >>> optimizer.reduce()
        >>> round(float(optimizer.clip(1e9)), 4)
        1.4142
        >>> optimizer.step()
        >>> layer.weight.tolist()
        [[-0.5, -0.5]]
    """

    def __init__(
        self,
        registry: GradientRegistry,
        groups: ProcessGroups,
        build: Callable[[Groups], Optimizer],
        decays: Callable[[str, nn.Parameter], bool] = lambda name, p: p.dim() >= 2,
    ) -> None:
        """Take the parameters' values as masters."""
        self._groups = groups
        self._buckets = list(_buckets(registry, groups, decays))
        if not self._buckets:
            raise LayoutError(f"rank {groups.rank} has nothing to train")
        chosen: Groups = []
        for decayed in (True, False):
            own = [b.own for b in self._buckets if b.decayed is decayed]
            if own:
                chosen.append({"params": own} | ({} if decayed else {"weight_decay": 0.0}))
        self.inner = build(chosen)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the parameters' values as masters again, after something else has set them."""
        for bucket in self._buckets:
            bucket.own.copy_(bucket.part(bucket.padded([p.detach() for p in bucket.parameters])))

    @torch.no_grad()
    def collect(self) -> None:
        """Add the parameters' gradients to the sums in float32, and drop them."""
        for bucket in self._buckets:
            parts = bucket.grads[: sum(bucket.sizes)].split(bucket.sizes)
            for part, parameter in zip(parts, bucket.parameters, strict=True):
                if parameter.grad is not None:
                    part.add_(parameter.grad.reshape(-1))
                    parameter.grad = None

    @torch.no_grad()
    def reduce(self, scale: float | None = None) -> None:
        """Give each rank its part of the gradient of the whole batch, and begin new sums.

        Args:
            scale: factor on the sums; see `moe.parallel.grads.reduce_gradients`.
        """
        factor = 1.0 / (self._groups.dims.dp * self._groups.dims.cp) if scale is None else scale
        for bucket in self._buckets:
            each = [len(bucket.own)] * bucket.group.size
            own = reduce_scatter_rows(bucket.grads, each, bucket.group)
            bucket.own.grad = own * factor
            bucket.grads.zero_()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient so that the norm of the whole model's is at most `max_norm`.

        Returns:
            The norm before, float64, the same on every rank. Where it is not finite the gradient
            is left as it is: look at it before `step`.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self._buckets[0].own.device)
        for bucket in self._buckets:
            assert bucket.own.grad is not None, "reduce comes first"
            squares += torch.linalg.vector_norm(bucket.own.grad).double().square()
        norm = all_reduce_sum(squares, self._groups["world"]).sqrt()
        factor = torch.where((norm > max_norm) & norm.isfinite(), max_norm / norm, 1.0)
        for bucket in self._buckets:
            assert bucket.own.grad is not None
            bucket.own.grad.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Step the masters with the inner optimizer, and set the parameters from them."""
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        for bucket in self._buckets:
            rounded = bucket.own.detach().to(bucket.parameters[0].dtype)  # fewer bytes to gather
            for parameter, values in zip(bucket.parameters, bucket.whole(rounded), strict=True):
                parameter.copy_(values)

    @torch.no_grad()
    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each parameter's name and state: masters and what the inner optimizer keeps.

        Whole, shaped as this rank's parameter; numbers that are kept once for a part, such as the
        count of steps, as they are. A bucket at a time, so as not to hold all states at once.
        """
        for bucket in self._buckets:
            kept = {MASTER: bucket.own.detach(), **self.inner.state.get(bucket.own, {})}
            whole = {
                name: bucket.whole(value)
                if value.shape == bucket.own.shape
                else [value.clone()] * len(bucket.names)
                for name, value in sorted(kept.items())
                if isinstance(value, Tensor)
            }
            for place, name in enumerate(bucket.names):
                yield name, {key: values[place] for key, values in whole.items()}

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Take back what `state` gave, under this or another mapping; sets the parameters, too.

        Args:
            read: returns the state of a parameter by its name.

        Raises:
            CheckpointError: a state is of another parameter, or of another optimizer; names it.
        """
        for bucket in self._buckets:
            states = [read(name) for name in bucket.names]
            for name, state, parameter in zip(bucket.names, states, bucket.parameters, strict=True):
                _check_state(name, state, parameter, states[0])
            kept = {}
            for key in states[0]:
                values = [state[key] for state in states]
                if values[0].shape == bucket.parameters[0].shape:
                    kept[key] = bucket.part(bucket.padded(values)).clone()
                else:
                    kept[key] = values[0].clone()
            bucket.own.copy_(kept.pop(MASTER))
            if kept:
                self.inner.state[bucket.own] = dict(kept)
            for parameter, state in zip(bucket.parameters, states, strict=True):
                parameter.copy_(state[MASTER])


def _check_state(
    name: str, state: Mapping[str, Tensor], parameter: nn.Parameter, first: Mapping[str, Tensor]
) -> None:
    if MASTER not in state:
        raise CheckpointError(f"the state of {name} holds {sorted(state)} and no {MASTER!r}")
    if state[MASTER].shape != parameter.shape:
        raise CheckpointError(
            f"the state of {name} is of shape {list(state[MASTER].shape)}, the parameter of "
            f"{list(parameter.shape)}"
        )
    if state.keys() != first.keys():
        raise CheckpointError(
            f"the state of {name} holds {sorted(state)}, that of others {sorted(first)}; they are "
            "of different optimizers"
        )


def _buckets(
    registry: GradientRegistry,
    groups: ProcessGroups,
    decays: Callable[[str, nn.Parameter], bool],
) -> Iterator[_Bucket]:
    """Lay out the parameters; those in one bucket are of one family and one type."""
    kinds: dict[tuple[Family, bool, torch.dtype], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter, family in registry.entries:
        if parameter.dim() == 0:
            raise LayoutError(f"parameter {name} has no dimension; give it one of size 1")
        kind = family, decays(name, parameter), parameter.dtype
        kinds.setdefault(kind, []).append((name, parameter))
    for (family, decayed, _), named in kinds.items():
        for part in _bounded(named):
            names, parameters = zip(*part, strict=True)
            yield _Bucket(list(names), list(parameters), groups[family.group], decayed)


def _bounded(
    named: list[tuple[str, nn.Parameter]],
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Cut a list of parameters where a bucket would become too large."""
    part: list[tuple[str, nn.Parameter]] = []
    held = 0
    for name, parameter in named:
        if part and held + parameter.numel() > BUCKET_ENTRIES:
            yield part
            part, held = [], 0
        part.append((name, parameter))
        held += parameter.numel()
    yield part
