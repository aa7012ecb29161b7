"""The engines as the ledger and their pods describe them. Pure."""

from __future__ import annotations

import dataclasses

from weightsync.wire import ReplicaState, ReplicaStatus
from weightsync_operator.api.names import Component
from weightsync_operator.api.status import REPLICAS_SHOWN, InferenceStatus, ReplicaView
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.observed import LedgerView, Seen, is_deleting, is_ready

STARTING = "STARTING"
ENDING = "ENDING"
LOST = "LOST"
NAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
    """All engines, not only those that the status shows."""

    wanted: int
    committed: int
    replicas: tuple[ReplicaView, ...] = ()
    """Laggards first."""
    ready: int = 0
    lenders: frozenset[str] = frozenset()
    """Engines from whose memory others can be brought up to date, with no trainer."""

    @property
    def laggards(self) -> tuple[str, ...]:
        """Engines that do not hold the committed version, missing ones by number."""
        behind = tuple(view.name for view in self.replicas if not self._is_current(view))
        missing = self.wanted - len(self.replicas)
        return (*behind, f"{missing} not created yet") if missing > 0 else behind

    @property
    def dirty(self) -> tuple[str, ...]:
        return tuple(view.name for view in self.replicas if view.state == ReplicaState.DIRTY)

    def numbers(self) -> InferenceStatus:
        current = sum(self._is_current(view) for view in self.replicas)
        return InferenceStatus(replicas=len(self.replicas), ready=self.ready, current=current)

    def shown(self) -> tuple[ReplicaView, ...]:
        return self.replicas[:REPLICAS_SHOWN]

    def _is_current(self, view: ReplicaView) -> bool:
        held = (ReplicaState.CLEAN, ReplicaState.OPEN, ReplicaState.VERIFIED)
        return view.state in held and view.version is not None and view.version >= self.committed


def observe_fleet(seen: Seen, wanted: int, committed: int = 0) -> Fleet:
    """The fleet of `wanted` engines; stale records of pods that are gone are left out.

    committed: the version that is known to be, should the ledger have lost it.
    """
    pods = seen.of_kind("Pod", Component.INFERENCE)
    ledger = seen.ledger or LedgerView(session="")
    records = {record.name: record for record in ledger.replicas}
    views = [_view(pod, records, ledger) for pod in pods]
    fleet = Fleet(
        wanted=wanted,
        committed=max(ledger.version, committed),
        ready=sum(is_ready(pod) for pod in pods),
        lenders=_lenders(pods, records, ledger),
    )
    views.sort(key=lambda view: (fleet._is_current(view), -1 if view.version is None else view.version, view.name))
    return dataclasses.replace(fleet, replicas=tuple(views))


def _lenders(pods: list[Manifest], records: dict[str, ReplicaStatus], ledger: LedgerView) -> frozenset[str]:
    names = {pod["metadata"]["name"] for pod in pods if not is_deleting(pod)} & records.keys() & ledger.live
    held = {name for name in names if records[name].lends and records[name].version >= ledger.version}
    return frozenset(name for name in held if records[name].state == ReplicaState.CLEAN)


def _view(pod: Manifest, records: dict[str, ReplicaStatus], ledger: LedgerView) -> ReplicaView:
    name = pod["metadata"]["name"]
    record = records.get(name)
    if record is None:
        state, reason = (ENDING, "has left its session") if is_deleting(pod) else (STARTING, "has not reported yet")
        return ReplicaView(name=name, state=state, reason=reason)
    if not ledger.error and name not in ledger.live:
        return ReplicaView(name=name, version=record.version, state=LOST, reason="its heartbeat ended")
    reason = "" if record.serving else record.reason[:1024]
    return ReplicaView(name=name, version=max(0, record.version), state=record.state, reason=reason)


def named(names: tuple[str, ...]) -> str:
    """The first few names and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
