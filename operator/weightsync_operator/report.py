"""Shows what is: statuses (conditions and epochs at once, figures at most every few seconds, nothing that already stands there),
events for the conditions that changed, and figures for Prometheus.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from weightsync_operator.api.status import WeightSyncStatus
from weightsync_operator.cluster import Cluster
from weightsync_operator.events import Events
from weightsync_operator.metrics import Metrics
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.notes import Note, notes

FIGURES_PERIOD_S = 5.0
_URGENT = ("observedGeneration", "revision", "model", "selector", "trainer", "preflight", "fabric")


class Reporter:
    """Remembers when each resource's status was written last."""

    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._events = Events(cluster)
        self._written_at: dict[tuple[str, str], float] = {}

    async def report(self, resource: Manifest, status: WeightSyncStatus) -> float:
        """Write what changed. Returns seconds until a held-back change may be written, infinity if there is none.

        Raises ApiError with status 409 if the resource changed since it was read: the pass starts again.
        """
        metadata = resource["metadata"]
        key = (metadata["namespace"], metadata["name"])
        self._metrics.show(key, status)
        old, patch = resource.get("status") or {}, status_patch(resource, status)
        if not patch:
            return math.inf
        left_s = self._written_at.get(key, -math.inf) + FIGURES_PERIOD_S - time.monotonic()
        if left_s > 0 and _urgent(old) == _urgent(_dump(status)):
            return left_s
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": patch}
        news = notes(old, status)
        await self._cluster.patch_status(*key, body)
        self._written_at[key] = time.monotonic()
        for note in news:
            await self._events.post(resource, note)
        return math.inf

    async def tell(self, resource: Manifest, note: Note) -> None:
        """An event that no condition stands for."""
        await self._events.post(resource, note)

    def forget(self, key: tuple[str, str]) -> None:
        self._written_at.pop(key, None)
        self._events.forget(key)
        self._metrics.forget(key)


def status_patch(resource: Manifest, status: WeightSyncStatus) -> dict[str, Any]:
    """What of `status` does not stand in the resource yet, as a JSON merge patch."""
    return merge_patch(resource.get("status") or {}, _dump(status))


def _dump(status: WeightSyncStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch from `old` to `new`; empty when they are equal."""
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if inner := merge_patch(before, value):
                patch[key] = inner
        elif value != before:
            patch[key] = value
    return patch


def _urgent(status: Mapping[str, Any]) -> Any:
    """What may not wait: everything but figures and words."""
    conditions = [(c["type"], c["status"], c["reason"]) for c in status.get("conditions") or []]
    return [status.get(field) for field in _URGENT], conditions
