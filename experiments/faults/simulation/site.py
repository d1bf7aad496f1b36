"""One shard's server process: it handles, commits, snapshots, dies and comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dgs._proto import parameter_server_pb2 as pb
from dgs.config import ServerConfig
from dgs.durable import Durable
from dgs.errors import DgsError, InternalError, ServerUnavailableError, StateError
from dgs.frame import Header
from dgs.server import ParameterServer
from dgs.session import Session
from dgs.state import fingerprint
from experiments.faults.simulation.checks import (
    Applied,
    Essence,
    Update,
    Violation,
    essence_of,
    frame_names,
)
from experiments.faults.simulation.disk import Crashed, SimDisk
from experiments.faults.simulation.network import Answer, Outcome
from experiments.faults.simulation.stage import Stage

__all__ = ["FIRST_INCARNATION", "RUN", "Site"]

RUN = 77
FIRST_INCARNATION = 1 << 62
"""Above every real clock, so that incarnations depend on virtual time alone."""

_DOWN_S = 0.2
_FULL_S = 0.5
_FINGERPRINTS = 0.25
"""Share of recoveries in which everything is compared, which takes longer than all the rest."""
_NOTHING: Essence = (0, b"", ())


@dataclass(slots=True)
class _Held:
    """A reply, or a refusal, that waits for the log."""

    position: int
    outcome: Outcome
    answer: Answer
    update: Update | None


class Site:
    """Serve one shard, as `dgs.transport.guard` and `dgs.keeper` do, but in virtual time.

    Args:
        shard: position among the servers.
        stage: what the history shares.
        chores: called after each commit, for what is due from time to time.

    Attributes:
        disk: of this machine.
        durable: the server while its process lives.
        history: the requests that have changed the state, by position.
        evicted: workers whose session was closed here because its lease had run out.
    """

    def __init__(self, shard: int, stage: Stage, chores: Callable[[Site, Durable], None]) -> None:
        self.shard = shard
        self._stage = stage
        self._chores = chores
        self.disk = SimDisk(f"disk{shard}", stage.weather, stage.rng, stage.trace)
        self._config = ServerConfig(hash_interval=stage.weather.hash_interval)
        self.durable: Durable | None = None
        self._dead_core: ParameterServer | None = None
        self._held: list[_Held] = []
        self._commits = False
        self._failed_before = 0
        self._acknowledged = 0
        self.history: list[Applied] = []
        self.evicted: set[str] = set()
        self._start()

    @property
    def core(self) -> ParameterServer | None:
        """The server's core while the process lives."""
        return self.durable.core if self.durable else None

    # ---- requests

    def receive(self, method: str, request: bytes, answer: Answer) -> None:
        """Carry out a request; its reply is held until the log has it."""
        stage, durable = self._stage, self.durable
        if durable is None:
            if stage.rng.random() < 0.5:  # else it is lost in the machine that is down
                answer(ServerUnavailableError("nobody listens"))
            return
        crash = stage.rng.random() < stage.weather.server_crash
        if crash and stage.rng.random() < 0.5:
            self.crash()
            return
        before, update = durable.position, None
        try:
            outcome: Outcome = durable.handle(method, request)
            if durable.position != before:
                update = self._note(durable, method, request)
            elif method == "Exchange":
                update = self._update_of(durable, request)
        except Crashed:
            self.crash()
            return
        except (DgsError, MemoryError) as error:
            outcome = self._refusal(durable, error)
            if durable.position != before:
                raise Violation(f"a refused {method} was logged: {error}") from error
        self._held.append(_Held(durable.position, outcome, answer, update))
        if crash:
            self.crash()
        elif not self._commits:
            self._commits = True
            stage.clock.after(stage.weather.gather_s * stage.rng.random(), self._commit)

    def _refusal(self, durable: Durable, error: Exception) -> DgsError:
        """Return what a client is told of an error, as `dgs.transport.guard` does."""
        if isinstance(error, MemoryError):
            self._stage.trace.add("out of memory", self.shard)
            delay_s = self._stage.soon(_DOWN_S)
            self._stage.clock.after(delay_s, lambda: self.crash_of(durable, power=False))
            return InternalError("internal error")
        if isinstance(error, StateError):
            return ServerUnavailableError(str(error))
        assert isinstance(error, DgsError)
        return error

    def _endanger(self, core: ParameterServer) -> None:
        """Let memory run out in the middle of an exchange, sometimes."""
        real, stage = core._answer, self._stage

        def answer(session: Session, header: Header, staleness: int) -> bytes:
            if stage.rng.random() < stage.weather.no_memory:
                raise MemoryError
            return real(session, header, staleness)

        core._answer = answer  # type: ignore[method-assign]

    def _note(self, durable: Durable, method: str, request: bytes) -> Update | None:
        """Write down a request that has changed the state."""
        position = durable.position
        if position != len(self.history) + 1:
            raise Violation(f"position {position} follows {len(self.history)}")
        entry = Applied(method, request, essence_of(durable.core))
        ledger = self._stage.ledger
        what: tuple[object, ...] = ()
        if method == "Join":
            join = pb.JoinRequest.FromString(request)
            entry.joined = (join.worker, join.incarnation)
            what = (join.worker, join.incarnation - FIRST_INCARNATION)
            ledger.note_joined(self.shard, join.worker, join.incarnation)
            ledger.note_opened(self.shard, entry.essence)
        elif method == "Exchange":
            update = entry.update = self._update_of(durable, request)
            replica = next(s[-1] for s in entry.essence[2] if s[0] == update.worker)
            ledger.note_applied(
                self.shard, position, update, frame_names(request).incarnation, replica
            )
            self._stage.tally.applied += 1
            what = (update.worker, f"update {update.number}")
        elif method == "Leave":
            leave = pb.LeaveRequest.FromString(request)
            what = (leave.worker_id, leave.incarnation - FIRST_INCARNATION)
        self._stage.trace.add("applied", self.shard, position, method, *what)
        self.history.append(entry)
        return entry.update

    def _update_of(self, durable: Durable, request: bytes) -> Update:
        """Return the update that a request is about."""
        number = frame_names(request).worker_id
        worker = durable.core.state.registry.worker_numbered(number)
        return self._stage.ledger.update_of(worker.name, self.shard, request)

    # ---- the log

    def _commit(self) -> None:
        """Make what was handled durable, and let the replies go that wait for it."""
        self._commits = False
        stage, durable = self._stage, self.durable
        if durable is None:
            return
        if stage.rng.random() < stage.weather.full:
            self._fill()
        try:
            durable.commit()
        except Crashed:
            self.crash_of(durable)
            return
        except StateError as error:
            self._refuse(durable, error)
            return
        if self.durable is durable:
            self._release(durable)
            self._chores(self, durable)

    def _release(self, durable: Durable) -> None:
        held, self._held = self._held, []
        for one in held:
            if one.position > durable.durable:
                self._held.append(one)
                continue
            self._acknowledged = max(self._acknowledged, one.position)
            if one.update is not None and isinstance(one.outcome, bytes):
                self._stage.ledger.note_acknowledged(self.shard, one.update, one.outcome)
                self._stage.trace.add("acknowledged", self.shard, one.update.number)
            one.answer(one.outcome)

    def _refuse(self, durable: Durable, error: StateError) -> None:
        """Answer that nothing can be promised."""
        self.excuse(durable, error)
        held, self._held = self._held, []
        for one in held:
            one.answer(ServerUnavailableError(str(error)))

    def excuse(self, durable: Durable, error: Exception) -> None:
        """Accept that something failed, on a disk that did; start anew if nothing else helps."""
        if self.disk.failed == self._failed_before and not durable.trouble:
            raise Violation(f"shard {self.shard} fails on a sound disk: {error}") from error
        self._stage.trace.add("refused", self.shard, str(error)[:60])
        if durable.trouble:
            delay_s = self._stage.soon(_DOWN_S)
            self._stage.clock.after(delay_s, lambda: self.crash_of(durable, power=False))

    def _fill(self) -> None:
        """Fill the disk for a while."""
        if not self.disk.is_full:
            self.disk.is_full = True
            self._stage.clock.after(self._stage.soon(_FULL_S), self.empty)

    def empty(self) -> None:
        """Make room on the disk."""
        self.disk.is_full = False

    # ---- death and return

    def crash(self, *, power: bool | None = None) -> None:
        """End the process; what comes after it is decided by the disk."""
        stage, durable = self._stage, self.durable
        if power is None:
            power = stage.rng.random() < stage.weather.power
        stage.trace.add("power lost" if power else "killed", self.shard, len(self.history))
        if power:
            stage.tally.power_losses += 1
        else:
            stage.tally.kills += 1
        if durable is not None:  # what broke off half done is not what the log has
            self._dead_core = None if durable.trouble else durable.core
        self.durable, self._held = None, []
        self.disk.die(power=power)
        stage.clock.after(stage.soon(_DOWN_S), self._start)

    def crash_of(self, durable: Durable, *, power: bool | None = None) -> None:
        """End the process, unless it has ended already."""
        if self.durable is durable:
            self.crash(power=power)

    def _start(self) -> None:
        """Recover what the disk has."""
        if self.durable is not None:
            return
        self._failed_before = self.disk.failed
        try:
            durable = Durable.open(self.disk, self._config, run=RUN)
        except Crashed:
            self.crash()
            return
        except (StateError, OSError) as error:
            if self.disk.failed == self._failed_before:
                raise Violation(f"shard {self.shard} cannot recover: {error}") from error
            self.crash(power=False)
            return
        self._check_recovered(durable)
        self.durable = durable
        if self._stage.weather.no_memory:
            self._endanger(durable.core)
        self._stage.tally.recoveries += bool(self.history)
        self._stage.trace.add("started", self.shard, durable.position)

    def _check_recovered(self, durable: Durable) -> None:
        """Compare what came back with what was there at the same position."""
        position, core = durable.position, durable.core
        if position < self._acknowledged:
            raise Violation(
                f"shard {self.shard} answered from position {self._acknowledged} and came back at "
                f"{position}"
            )
        if position > len(self.history):
            raise Violation(f"shard {self.shard} came back at {position}, ahead of its history")
        wanted = self.history[position - 1].essence if position else _NOTHING
        if essence_of(core) != wanted:
            raise Violation(f"shard {self.shard} came back different at position {position}")
        dead = self._dead_core
        if (
            self._stage.rng.random() < _FINGERPRINTS
            and dead is not None
            and position == len(self.history)
            and fingerprint(core.state) != fingerprint(dead.state)
        ):
            raise Violation(f"shard {self.shard} came back with another fingerprint")
        self._stage.ledger.forget_after(self.shard, position)
        del self.history[position:]
        self._stage.ledger.restart_joined(self.shard)
        for entry in self.history:
            if entry.joined is not None:
                self._stage.ledger.note_joined(self.shard, *entry.joined)

    def restart(self) -> None:
        """Lose power at a moment when everything that was promised must be on the disk."""
        self.crash(power=True)
        self._start()
        if self.durable is None:
            raise Violation(f"shard {self.shard} does not start on a sound disk")
