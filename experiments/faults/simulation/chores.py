"""What a server does besides answering: snapshots, and closing sessions whose lease has run out."""

from __future__ import annotations

from dgs._proto import parameter_server_pb2 as pb
from dgs.durable import Durable
from dgs.errors import StateError
from dgs.leases import Leases
from experiments.faults.simulation.disk import Crashed
from experiments.faults.simulation.site import RUN, Site
from experiments.faults.simulation.stage import Stage

__all__ = ["Chores"]

_SOON_S = 0.02
_WRITING_S = 0.05
"""Mean time between the beginning of a snapshot and its writing."""


class Chores:
    """Decide after each commit of a site whether something is due.

    Args:
        stage: what the history shares.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._saving: set[int] = set()
        self._of: Durable | None = None
        self._leases = Leases(0.0)

    def __call__(self, site: Site, durable: Durable) -> None:
        """Close silent sessions, and begin a snapshot a little later."""
        stage = self._stage
        if stage.rng.random() < stage.weather.snapshot:
            stage.clock.after(stage.soon(_SOON_S), lambda: self._begin(site, durable))
        if stage.weather.lease_s and not stage.weather.is_calm:
            self._evict(site, durable)

    def _begin(self, site: Site, durable: Durable) -> None:
        """Begin a snapshot, to be written while requests come in."""
        stage = self._stage
        if id(durable) in self._saving or site.durable is not durable:
            return
        try:
            snapshot = durable.begin_snapshot()
        except Crashed:
            site.crash_of(durable)
            return
        except (StateError, OSError) as error:
            site.excuse(durable, error)
            return
        self._saving.add(id(durable))
        stage.trace.add("snapshot begun", site.shard, durable.position)

        def write() -> None:
            if site.durable is durable:
                site.disk.meanwhile = lambda: self._meanwhile(site)
                try:
                    durable.finish_snapshot(snapshot)
                    stage.tally.snapshots += 1
                    stage.trace.add("snapshot finished", site.shard)
                except Crashed:
                    site.crash_of(durable)
                except (StateError, OSError) as error:
                    site.excuse(durable, error)
                if site.durable is durable:
                    site.disk.meanwhile = None
            self._saving.discard(id(durable))

        stage.clock.after(stage.soon(_WRITING_S), write)

    def _meanwhile(self, site: Site) -> None:
        """Let something else happen between two operations of a snapshot."""
        stage = self._stage
        if stage.rng.random() < stage.weather.interleave:
            disk = site.disk
            outside, life, disk.meanwhile = disk.meanwhile, disk.life, None
            stage.clock.step()
            if disk.life == life:
                disk.meanwhile = outside

    def _evict(self, site: Site, durable: Durable) -> None:
        """Close the sessions that have been silent for too long."""
        stage = self._stage
        if self._of is not durable:
            self._of, self._leases = durable, Leases(stage.weather.lease_s)
        places = list(durable.core.state.registry.places())
        for number, member, incarnation in self._leases.observe(stage.clock.now, places):
            request = pb.LeaveRequest(
                run=RUN, worker_id=number, member=member, incarnation=incarnation
            )
            worker = durable.core.state.registry.worker_numbered(number).name
            stage.tally.evictions += 1
            site.evicted.add(worker)
            stage.trace.add("evicts", site.shard, worker)
            site.receive("Leave", request.SerializeToString(), lambda _: None)
            if site.durable is not durable:
                return
