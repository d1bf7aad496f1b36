"""The one changed line: any torch optimizer, made asynchronous and sparse both ways."""

from __future__ import annotations

import copy
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

from torch import Tensor
from torch.optim import Optimizer

from dgs.binding import Binding
from dgs.checkpoint import read_state, state_file, write_state
from dgs.config import WorkerConfig
from dgs.errors import ConfigError
from dgs.exchange import Exchanger
from dgs.metrics import Stats
from dgs.momentum import has_momentum
from dgs.transport.connect import Servers, connect

__all__ = ["DistributedOptimizer"]

SAVED_BY_EXCHANGER = (
    *("round_steps", "worker", "cursor", "worker_state", "local", "local_buffers"),
    *("start", "steps", "exchanges"),
)
SAVED_BY_WORKER = (
    *("base", "buffers", "averaged", "selection", "sequence", "versions"),
    *("in_flight", "runs", "incarnations"),
)
"""What loading reads of the saved state, besides what the momentum rule saved."""


class DistributedOptimizer(Optimizer):
    """Wrap an optimizer so that it trains one model together with other workers.

    Every `local_steps` steps, what the inner optimizer changed is added to a velocity, the largest
    entries of that are sent to the parameter server, and the largest differences between the
    server's model and this worker's come back. At density 1 without momentum this is asynchronous
    SGD, bit for bit.

    It is a `torch.optim.Optimizer` and shares `param_groups` with the inner one: schedulers,
    closures, gradient clipping and `GradScaler` work on it.

    Args:
        inner: any `torch.optim` optimizer; its parameters keep their groups and settings.
        named_parameters: ``model.named_parameters()``, of the whole model; the first worker's
            values start the run, all others start from the server's. With tied weights, pass
            ``model.named_parameters(remove_duplicate=False)``: by default torch lists the first
            of their names only, and `pull_model` can give no other.
        server: ``"HOST:PORT"``, several separated by commas for several shards, or a
            `dgs.ParameterServer` in this process; None reads ``DGS_SERVER``.
        config: settings; those given by name below take precedence.
        named_buffers: ``model.named_buffers()``, to have float buffers (such as BatchNorm's
            statistics) averaged by the server and included in its model, in float32: float64
            buffers are rounded to it. Integer buffers and those with infinities stay local; leave
            out buffers that are not in the model's ``state_dict()``.
        **settings: fields of `dgs.WorkerConfig`.

    Raises:
        ConfigError: a setting is out of range, a parameter has no name, `inner` is no optimizer,
            or the checkpoint is damaged or another worker's.
        ServerUnavailableError: the server was not reached within `retry.connect_budget_s`.
        ModelMismatchError: the server holds another model; names the first differing tensor.

    Note:
        Not collective: each worker steps at its own pace. `step` waits for the server's answer
        unless `overlap` is set. With ``checkpoint=PATH`` the state is kept in a file, and loaded
        from it at the start if it is there, as by `load_state_dict`; learning rate schedulers and
        random number generators stay yours to set, from `cursor`. It holds open connections, so it
        can be neither copied nor pickled; what it knows is in `state_dict`.

    Example:
        >>> import dgs, torch
        >>> model, server = torch.nn.Linear(2, 1), dgs.ParameterServer()
        >>> opt = dgs.DistributedOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     named_parameters=model.named_parameters(), server=server, momentum=0.7)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step(); opt.stats.exchanges
        1

    References:
        Yan et al., "Dual-Way Gradient Sparsification for Asynchronous Distributed Deep Learning",
        ICPP 2020. With SGD inside and ``local_steps=1`` this is the paper's algorithm.
    """

    def __init__(
        self,
        inner: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        server: Servers | None = None,
        config: WorkerConfig | None = None,
        *,
        named_buffers: Iterable[tuple[str, Tensor]] = (),
        **settings: Any,
    ) -> None:
        """Join the run; the parameters are set to the server's model, if it has one."""
        _require_optimizer(inner)
        self._config = config = _configure(config, settings)
        super().__init__([dict(g) for g in inner.param_groups], inner.defaults)
        self._inner = inner
        self._share_groups()
        averaged = named_buffers if config.buffers == "average" else ()
        self._binding = Binding(inner, named_parameters, averaged)
        self._round_steps = 0
        self._rounds = 0  # since the last checkpoint
        self._closed = False
        self._pid = os.getpid()
        self._named = bool(config.worker)
        self._file = state_file(config.checkpoint, config.worker) if config.checkpoint else None
        saved = _read_checkpoint(self._file, config.worker)
        name = config.worker or _random_name()
        transports = connect(server, config.retry, security=config.security)
        try:
            self._exchanger = Exchanger(self._binding, transports, config, name)
        except BaseException:
            for transport in transports:
                transport.close()
            raise
        self.stats: Stats = self._exchanger.stats
        if saved is not None:
            self._go_on(saved)

    def _go_on(self, saved: dict[str, Any]) -> None:
        """Load a checkpoint, and finish the exchange that it was written in."""
        try:
            self._load(saved)
            if self._exchanger.in_flight:
                self._write()  # under the new incarnation: this process may be killed as well
                self._exchanger.finish()
        except BaseException:
            self._exchanger.close(leave=False)
            raise

    @property
    def cursor(self) -> bytes:
        """What is kept with the next update, opaque, at most 4096 bytes: your place in the data.

        Set it before `step`, to where the data will be after that step. It travels with the update
        of the round that the step ends, to every server, which keeps it if and only if it applies
        the update. What is set when a round ends is what counts, also with `overlap` or
        `local_steps`.

        After the start it is the cursor of this worker's last update that was applied, ``b""`` if
        none was; where a saved state goes on bit for bit, the saved one. The same after a step in
        which the worker had to join again: what lies between is the update that was lost. Of
        several servers, the one counts that has applied the most: of an update that only some of
        them have applied, the rest is lost, and the data is not used twice.

        Raises:
            ConfigError: it is set to something that is not bytes, or too long.

        Example:
            Go on in the data where the last process that was called "w" stopped::

                opt = dgs.DistributedOptimizer(sgd, model.named_parameters(), worker="w")
                for i in range(int(opt.cursor or b"0"), len(batches)):
                    loss(model, batches[i]).backward()
                    opt.cursor = str(i + 1).encode()
                    opt.step()
                    opt.zero_grad()
        """
        return self._exchanger.cursor

    @cursor.setter
    def cursor(self, value: bytes) -> None:
        self._exchanger.cursor = value

    @property
    def inner(self) -> Optimizer:
        """The optimizer that makes the steps."""
        return self._inner

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters must have been named at the start."""
        if not hasattr(self, "_binding"):  # the base class's constructor
            super().add_param_group(param_group)
            return
        params = param_group["params"]
        self._binding.check_named([params] if isinstance(params, Tensor) else list(params))
        self._inner.add_param_group(param_group)
        self._share_groups()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the inner optimizer and, every `local_steps` steps, exchange with the servers.

        Args:
            closure: passed on to the inner optimizer.

        Returns:
            What the inner optimizer returns: the closure's loss, if there is one.

        Raises:
            NonFiniteError: the step made a parameter or buffer NaN or infinite; nothing was sent,
                and the parameters are back where the round started.
            ServerUnavailableError: no answer within `retry.budget_s`. The exchange is finished
                first by the next call of `step`; nothing is lost or applied twice.
            ConfigError: the optimizer is closed; or a checkpoint could not be written: the step
                is done then, and its exchange is finished by the next one.
        """
        self._check_open()
        if not self.stats.steps:
            _warn_of_double_momentum(self._inner, self._config)
        self._exchanger.begin_step()
        loss = self._binding.step(closure)
        self.stats.steps += 1
        self._round_steps += 1
        if self._round_steps >= self._config.local_steps:
            self._round_steps = 0
            self._rounds += 1
            every = self._config.checkpoint_every
            self._exchanger.end_round(self._write if 0 < every <= self._rounds else None)
        return loss

    def save(self) -> None:
        """Write a checkpoint now, to the place that was given as ``checkpoint``.

        Raises:
            ConfigError: none was given, or the file cannot be written.
        """
        self._check_open()
        if self._file is None:
            raise ConfigError("there is no place for a checkpoint; give checkpoint=PATH at first")
        self._write()

    def _write(self) -> None:
        assert self._file is not None
        write_state(self._file, self.state_dict())
        self._rounds = 0

    def pull_model(self) -> dict[str, Tensor]:
        """Fetch the servers' model: what to evaluate and to keep, never one worker's own.

        Load it into another copy of the model: what is written into the parameters that are
        trained counts as progress and would be sent.

        Returns:
            Float32 tensors on the CPU, averaged buffers and tied names included.
        """
        return self._exchanger.pull_model()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and everything the exchange depends on.

        A run that is interrupted and resumed from it equals the uninterrupted one bit for bit, as
        long as the server has answered nothing to this worker since. It holds tensors, numbers,
        strings, lists and dictionaries only, so ``torch.load(weights_only=True)`` reads it.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        exchange = self._exchanger.state()
        with self._binding.masters_in_place():
            state = copy.deepcopy(self._inner.state_dict())
        state["dgs"] = {"round_steps": self._round_steps, **exchange}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the parameters are set as well.

        If the server's record of this worker is still the one that was saved, the session goes on
        bit for bit. Otherwise the worker rejoins: it starts from the server's model and keeps its
        saved velocity; that is logged and counted in `stats.rejoins`.

        Raises:
            ConfigError: the state is not one of this class, or of another model or rule.
        """
        self._check_open()
        state_dict = dict(state_dict)  # hooks may change what they are given
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        _require_saved(state_dict)
        saved = state_dict["dgs"]
        self._exchanger.check_state(saved)
        with self._binding.masters_in_place():
            self._inner.load_state_dict({k: v for k, v in state_dict.items() if k != "dgs"})
        self._share_groups()
        resumed = self._exchanger.load_state(saved, rename=not self._named)
        self._round_steps = saved["round_steps"] if resumed else 0

    def close(self, *, leave: bool = True) -> None:
        """Finish the exchange in flight and close the connections; later steps raise.

        With ``checkpoint=PATH``, the state is written first.

        Args:
            leave: tell the server that this worker is done, so that it frees its record. With
                False the record stays, for a later process to resume from a saved state.
        """
        try:
            if self._file is not None and not self._closed and os.getpid() == self._pid:
                self._write()
        finally:
            self._closed = True
            self._exchanger.close(leave=leave)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be copied or pickled."""
        _refuse_copies()

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        _refuse_copies()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError(
                "this optimizer is closed; make a new one, and load the state_dict() that was "
                "saved if this worker is to go on"
            )

    def _share_groups(self) -> None:
        # the same objects, so that schedulers and scalers that hold this optimizer reach the inner
        self.param_groups = self._inner.param_groups
        self.state = self._inner.state


def _configure(config: WorkerConfig | None, settings: dict[str, Any]) -> WorkerConfig:
    try:
        config = replace(config or WorkerConfig(), **settings)
    except TypeError as e:
        known = ", ".join(WorkerConfig.__dataclass_fields__)
        unknown = ", ".join(s for s in settings if s not in WorkerConfig.__dataclass_fields__)
        raise ConfigError(f"unknown setting {unknown}; the settings are {known}") from e
    return replace(config, worker=config.worker or os.environ.get("DGS_WORKER", ""))


def _read_checkpoint(file: Path | None, worker: str) -> dict[str, Any] | None:
    """Read the checkpoint to go on from, if there is one.

    Raises:
        ConfigError: it is damaged, or of another worker than the named one.
    """
    if file is None or not file.exists():
        return None
    saved = read_state(file)
    _require_saved(saved)
    owner = saved["dgs"]["worker"]
    if worker and owner != worker:
        raise ConfigError(
            f"checkpoint {file} is of worker {owner!r}, this one is {worker!r}; end the path with "
            "a slash, and each worker has a file of its own in that folder"
        )
    return saved


def _require_optimizer(inner: object) -> None:
    if not isinstance(inner, Optimizer):
        raise ConfigError(
            f"the optimizer to wrap is a {type(inner).__name__}; give a torch.optim.Optimizer, "
            "such as torch.optim.SGD(model.parameters(), lr=0.1)"
        )


def _require_saved(state_dict: dict[str, Any]) -> None:
    """Check that a saved state has all that loading it reads.

    Raises:
        ConfigError: it has not; names what is missing.
    """
    if "dgs" not in state_dict:
        raise ConfigError(
            "this is not the state of a dgs.DistributedOptimizer; load it into the inner "
            "optimizer instead"
        )
    saved = state_dict["dgs"]
    worker = saved.get("worker_state") if isinstance(saved, dict) else None
    for where, part, names in (
        ("it", state_dict, ("state", "param_groups")),
        ("its 'dgs' part", saved, SAVED_BY_EXCHANGER),
        ("its 'worker_state' part", worker, SAVED_BY_WORKER),
    ):
        missing = [n for n in names if n not in part] if isinstance(part, dict) else list(names)
        if missing:
            raise ConfigError(
                f"the saved state is incomplete: {where} lacks {', '.join(missing)}; load what "
                "state_dict() returned, whole"
            )


def _warn_of_double_momentum(inner: Optimizer, config: WorkerConfig) -> None:
    if config.local_steps > 1 or not config.momentum or not has_momentum(config.rule):
        return
    if any(g.get("momentum") or "betas" in g for g in inner.param_groups):
        warnings.warn(
            f"{type(inner).__name__} has momentum of its own, which at local_steps=1 "
            f"adds to rule={config.rule!r} with momentum={config.momentum}; set "
            "one of them to 0, or take more local steps",
            stacklevel=_users_stacklevel(),
        )


def _refuse_copies() -> NoReturn:
    raise TypeError(
        "a DistributedOptimizer holds open connections and can be neither copied nor pickled; save "
        "its state_dict() instead, and load that into a new one"
    )


def _users_stacklevel() -> int:
    """Count the calls up to the code that is neither torch's nor this module's.

    Hooks, profiling, learning rate schedulers and gradient scalers each wrap `step`.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _wraps_step(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _wraps_step(module: str) -> bool:
    return module == __name__ or module.partition(".")[0] == "torch"


def _random_name() -> str:
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(3)}"
