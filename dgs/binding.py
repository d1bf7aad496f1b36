"""A user's parameters and buffers, bound to a model's index space.

The rest of the library sees flat float32 tensors in one order. Here stands which tensor of the
user's each of them is: tied weights once, float buffers last, and for parameters of lower
precision a float32 *master* that the inner optimizer steps in the parameter's place, so that
progress below the parameter's precision is not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dgs.errors import ConfigError, NonFiniteError
from dgs.space import FloatArray, ParameterSpace, TensorSpec

__all__ = ["Binding"]

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Binding:
    """The tensors that are trained, in the order of the index space.

    Args:
        inner: the optimizer that steps them; each of its parameters must be named.
        named_parameters: names and parameters, as ``model.named_parameters()`` gives them.
        named_buffers: names and buffers to average, in float32; those that are not floating point,
            or that hold infinities (masks), are left out.

    Raises:
        ConfigError: a parameter of the optimizer has no name, a dtype is not supported, or a name
            stands for two tensors.
    """

    def __init__(
        self,
        inner: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        named_buffers: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        """Match names, parameters and masters."""
        self._inner = inner
        parameters = _unique(named_parameters)
        buffers = _unique((n, b) for n, b in named_buffers if _can_be_averaged(b))
        self._params = [tensor for _, tensor in parameters]
        self._buffers = [tensor for _, tensor in buffers]
        _check_dtypes(parameters)
        self._masters = [
            p.detach().float().requires_grad_() if p.dtype in LOW_PRECISION else p
            for p in self._params
        ]
        self._known = {id(p) for p in self._params}
        for group in inner.param_groups:
            self.check_named(group["params"])
        self.space = ParameterSpace(
            tuple(
                TensorSpec(names[0], tuple(t.shape), buffer=kind, aliases=tuple(names[1:]))
                for kind, listed in ((False, parameters), (True, buffers))
                for names, t in listed
            )
        )

    @property
    def device(self) -> torch.device:
        """Where base and velocity should live: with the first parameter."""
        return self._params[0].device if self._params else torch.device("cpu")

    @property
    def num_tensors(self) -> int:
        """Count the parameters."""
        return len(self._params)

    @property
    def has_masters(self) -> bool:
        """Whether any parameter is of lower precision than float32."""
        return any(m is not p for m, p in zip(self._masters, self._params, strict=True))

    def check_named(self, params: Iterable[Tensor]) -> None:
        """Refuse parameters that `named_parameters` did not list.

        Raises:
            ConfigError: names the shape of the first one.
        """
        for p in params:
            if id(p) not in self._known:
                raise ConfigError(
                    f"the optimizer steps a parameter of shape {list(p.shape)} that is not in "
                    "named_parameters; pass model.named_parameters() of the whole model"
                )

    def local(self, unit: int) -> Tensor:
        """Return parameter `unit` as the inner optimizer left it: flat, float32, no gradient."""
        return self._masters[unit].detach().reshape(-1)

    @torch.no_grad()
    def write(self, unit: int, values: Tensor) -> None:
        """Set parameter `unit`, and its master, from flat float32 values."""
        param, master = self._params[unit], self._masters[unit]
        master.copy_(values.view(master.shape))
        if master is not param:
            param.copy_(master)

    def check_finite(self) -> None:
        """Check what the inner optimizer left.

        Raises:
            NonFiniteError: a parameter or buffer holds NaN or Inf; names it.
        """
        tensors = [*self._masters, *self._buffers]
        for spec, tensor in zip(self.space.tensors, tensors, strict=True):
            if not bool(torch.isfinite(tensor.detach()).all()):
                what = "buffer" if spec.buffer else "parameter"
                raise NonFiniteError(
                    f"the step made {what} {spec.name!r} NaN or infinite; nothing was sent and "
                    "the parameters are back where the round started. Look at the loss and the "
                    "learning rate, clip gradients, or skip the batch"
                )

    def read_model(self) -> FloatArray:
        """Return parameters and buffers as one flat float32 array: the model before training."""
        return _flatten([*self._masters, *self._buffers])

    def read_buffers(self) -> FloatArray:
        """Return the float buffers as one flat float32 array."""
        return _flatten(self._buffers)

    @torch.no_grad()
    def write_buffers(self, values: FloatArray) -> None:
        """Set the float buffers from one flat float32 array."""
        start = 0
        for buffer in self._buffers:
            stop = start + buffer.numel()
            buffer.copy_(torch.from_numpy(values[start:stop]).view(buffer.shape))
            start = stop

    def state(self) -> dict[str, Any]:
        """Return parameters and buffers as copies, for `load_state`."""
        return {
            "local": [self.local(unit).clone() for unit in range(self.num_tensors)],
            "local_buffers": torch.from_numpy(self.read_buffers().copy()),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Set parameters and buffers to what they were."""
        for unit, values in enumerate(state["local"]):
            self.write(unit, values)
        self.write_buffers(state["local_buffers"].cpu().numpy())

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Run one step of the inner optimizer, on the masters where there are any.

        Args:
            closure: evaluates the model again and returns the loss, or None.

        Returns:
            What the inner optimizer's `step` returns.
        """
        if not self.has_masters:
            return self._inner.step() if closure is None else self._inner.step(closure)

        def evaluate() -> Any:
            assert closure is not None
            self._masters_to_params()
            self._exchange_groups(self._masters, self._params)
            try:
                with torch.enable_grad():
                    return closure()
            finally:
                self._exchange_groups(self._params, self._masters)
                self._grads_to_masters()

        with self.masters_in_place():
            try:
                self._grads_to_masters()
                return self._inner.step() if closure is None else self._inner.step(evaluate)
            finally:
                self._masters_to_params()
                for master, _ in self._lower():
                    master.grad = None

    @contextmanager
    def masters_in_place(self) -> Iterator[None]:
        """Let the inner optimizer see masters in its groups, for as long as the context lasts.

        Its state belongs to the masters, so saving and loading that state needs this as well.
        State that it made while it saw the parameters is moved to the masters first.
        """
        self._exchange_groups(self._params, self._masters)
        try:
            self._state_to_masters()
            yield
        finally:
            self._exchange_groups(self._masters, self._params)

    def _exchange_groups(self, old: list[Tensor], new: list[Tensor]) -> None:
        swap = {id(a): b for a, b in zip(old, new, strict=True)}
        for group in self._inner.param_groups:  # in place: some optimizers keep the list itself
            group["params"][:] = [swap.get(id(p), p) for p in group["params"]]

    def _state_to_masters(self) -> None:
        state = self._inner.state
        for master, param in self._lower():
            found = state.pop(param, None)
            if found and not state.get(master):  # looking it up leaves an empty one behind
                state[master] = _widened(found)

    def _lower(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(self._masters, self._params, strict=True)
        return ((m, p) for m, p in pairs if m is not p)

    def _grads_to_masters(self) -> None:
        for master, param in self._lower():
            master.grad = None if param.grad is None else param.grad.detach().float()

    @torch.no_grad()
    def _masters_to_params(self) -> None:
        for master, param in self._lower():
            param.copy_(master)


def _unique(named: Iterable[tuple[str, Tensor]]) -> list[tuple[list[str], Tensor]]:
    """Group names by tensor, in order of first appearance: tied weights appear once."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for entry in named:
        name, tensor = entry
        names, _ = found.setdefault(id(tensor), ([], tensor))
        if name not in names:
            names.append(name)
    return list(found.values())


def _flatten(tensors: Iterable[Tensor]) -> FloatArray:
    flat = [t.detach().reshape(-1).to("cpu", torch.float32) for t in tensors]
    return torch.cat([torch.zeros(0, dtype=torch.float32, device="cpu"), *flat]).numpy()


def _widened(value: Any) -> Any:
    """Return an optimizer's state with every tensor of lower precision as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in LOW_PRECISION else value
    if isinstance(value, dict):
        return {k: _widened(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_widened(v) for v in value)
    return value


def _can_be_averaged(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and bool(torch.isfinite(buffer).all())


def _check_dtypes(parameters: Iterable[tuple[list[str], Tensor]]) -> None:
    for names, p in parameters:
        if p.dtype not in (torch.float32, *LOW_PRECISION):
            raise ConfigError(
                f"parameter {names[0]!r} is {p.dtype}; exchanges are in float32, so parameters "
                "must be float32, bfloat16 or float16"
            )
