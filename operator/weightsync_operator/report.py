"""Writes statuses: conditions and epochs at once, figures at most every few seconds, and nothing that already stands there."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from weightsync_operator.api.status import WeightSyncStatus
from weightsync_operator.cluster import Cluster
from weightsync_operator.plan.build.context import Manifest

FIGURES_PERIOD_S = 5.0
_URGENT = ("observedGeneration", "revision", "model", "selector", "trainer", "preflight", "fabric")


class Reporter:
    """Remembers when each resource's status was written last."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._written_at: dict[tuple[str, str], float] = {}

    async def report(self, resource: Manifest, status: WeightSyncStatus) -> float:
        """Write what changed. Returns seconds until a held-back change may be written, infinity if there is none.

        Raises ApiError with status 409 if the resource changed since it was read: the pass starts again.
        """
        metadata = resource["metadata"]
        key = (metadata["namespace"], metadata["name"])
        old, new = resource.get("status") or {}, status.model_dump(mode="json", by_alias=True, exclude_none=True)
        patch = merge_patch(old, new)
        if not patch:
            return math.inf
        left_s = self._written_at.get(key, -math.inf) + FIGURES_PERIOD_S - time.monotonic()
        if left_s > 0 and _urgent(old) == _urgent(new):
            return left_s
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": patch}
        await self._cluster.patch_status(*key, body)
        self._written_at[key] = time.monotonic()
        return math.inf

    def forget(self, key: tuple[str, str]) -> None:
        self._written_at.pop(key, None)


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
