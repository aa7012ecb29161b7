"""What Prometheus reads at /metrics: of the operator, and of each resource by namespace and name. Imports prometheus_client only.

A resource's figures are made at the scrape from its last status, so that they go when it goes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Awaitable, Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from weightsync_operator.api.names import Condition
from weightsync_operator.api.status import WeightSyncStatus
from weightsync_operator.cluster import ApiError

Key = tuple[str, str]
LABELS = ("namespace", "name")
_CONFLICT = 409
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclasses.dataclass
class _Figures:
    """Of one resource."""

    status: WeightSyncStatus
    pushes: int = 0
    last_push: tuple[object, ...] | None = None


class Metrics:
    """All metrics of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._figures: dict[Key, _Figures] = {}
        self._seconds = Histogram(
            "weightsync_operator_reconcile_seconds",
            "A pass over one resource",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._errors = Counter(
            "weightsync_operator_reconcile_errors",
            "Passes that failed and are repeated",
            LABELS,
            registry=self.registry,
        )
        self._queue = Gauge("weightsync_operator_queue_depth", "Resources that wait for a pass", registry=self.registry)
        self._leader = Gauge("weightsync_operator_leader", "1 while this operator may write", registry=self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def follow(self, *, queue_depth: Callable[[], float], leads: Callable[[], bool]) -> None:
        """Ask these at each scrape."""
        self._queue.set_function(queue_depth)
        self._leader.set_function(lambda: float(leads()))

    def measured(self, reconcile: Callable[[Key], Awaitable[float | None]]) -> Callable[[Key], Awaitable[float | None]]:
        """`reconcile` with its duration and its errors counted; a conflict is no error, it is the pass after a change."""

        async def pass_(key: Key) -> float | None:
            with self._seconds.time():
                try:
                    return await reconcile(key)
                except Exception as error:
                    if not (isinstance(error, ApiError) and error.status == _CONFLICT):
                        self._errors.labels(*key).inc()
                    raise

        return pass_

    def show(self, key: Key, status: WeightSyncStatus) -> None:
        """The resource's figures from now on."""
        figures = self._figures.setdefault(key, _Figures(status))
        push = status.last_push
        ended = None if push is None else (push.epoch, push.version, push.outcome, push.finished_at)
        figures.pushes += ended is not None and ended != figures.last_push
        figures.status, figures.last_push = status, ended

    def forget(self, key: Key) -> None:
        """The resource is gone, and with it every label that names it."""
        self._figures.pop(key, None)
        self._errors.remove(*key)

    def page(self) -> tuple[int, str]:
        """/metrics"""
        return 200, generate_latest(self.registry).decode()

    def collect(self) -> Iterator[Metric]:
        """The figures of all resources, for the registry."""
        for name, words, value in _GAUGES:
            family = GaugeMetricFamily(f"weightsync_resource_{name}", words, labels=LABELS)
            for key, figures in self._figures.items():
                family.add_metric(key, value(figures.status))
            yield family
        pushes = CounterMetricFamily("weightsync_resource_pushes", "Pushes whose end was seen", labels=LABELS)
        for key, figures in self._figures.items():
            pushes.add_metric(key, figures.pushes)
        yield pushes


def _skew(status: WeightSyncStatus) -> float:
    """The status shows laggards first, so the oldest is among the few that it shows."""
    held = [replica.version for replica in status.replicas if replica.version is not None]
    return float(max(0, status.version.committed - min(held))) if held else math.nan


def _condition(status: WeightSyncStatus, type_: Condition) -> float:
    found = {condition.type: condition.status for condition in status.conditions}
    return {"True": 1.0, "False": 0.0}.get(found.get(type_, ""), math.nan)


def _of_push(status: WeightSyncStatus, field: str) -> float:
    return math.nan if status.last_push is None else float(getattr(status.last_push, field))


_GAUGES: tuple[tuple[str, str, Callable[[WeightSyncStatus], float]], ...] = (
    ("published_version", "The last version that was tried", lambda s: s.version.published),
    ("committed_version", "The version in force", lambda s: s.version.committed),
    ("version_skew", "Versions that the oldest engine is behind; NaN before one reported", _skew),
    ("engines", "Engine pods", lambda s: s.inference.replicas),
    ("engines_ready", "Engine pods that answer requests", lambda s: s.inference.ready),
    ("engines_current", "Engine pods that hold the committed version", lambda s: s.inference.current),
    ("epoch", "Incarnation of the trainer", lambda s: s.trainer.epoch),
    ("last_push_seconds", "Of the newest push that ended, from begin to decision", lambda s: _of_push(s, "seconds")),
    ("last_push_bytes", "Its payload, counted at the receivers", lambda s: _of_push(s, "bytes")),
    ("last_push_pause_seconds", "The longest pause of an engine in it", lambda s: _of_push(s, "pause_seconds")),
    ("synced", "Condition Synced; NaN while unknown", lambda s: _condition(s, Condition.SYNCED)),
    ("degraded", "Condition Degraded", lambda s: _condition(s, Condition.DEGRADED)),
    ("spec_valid", "Condition SpecValid; NaN while unknown", lambda s: _condition(s, Condition.SPEC_VALID)),
)
