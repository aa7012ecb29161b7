"""Events of Kubernetes about a resource: one object for each condition and reason, counted when it happens again.

So there are never more of them than reasons; a resource that flaps is told less and less often.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from datetime import UTC, datetime

from weightsync_operator.api.names import API_VERSION, KIND
from weightsync_operator.cluster import ApiError, ApiUnavailable, Cluster
from weightsync_operator.fence import clock
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.notes import Note

BURST = 25
REFILL_S = 60.0
"""One more a minute for each resource, as Kubernetes' own clients allow about the same."""
_CONFLICT = 409
_COMPONENT = "weightsync-operator"

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Told:
    """Of one resource."""

    left: float = BURST
    counted_at: float = dataclasses.field(default_factory=clock)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


class Events:
    """Posts notes; losing one is no failure."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._told: dict[tuple[str, str], _Told] = {}

    async def post(self, resource: Manifest, note: Note) -> None:
        """Say it, unless this resource has said too much; what the API server refuses is logged."""
        metadata = resource["metadata"]
        key = (metadata["namespace"], metadata["name"])
        told = self._told.setdefault(key, _Told())
        if not _may_speak(told):
            return
        name = _name(metadata, note)
        try:
            await self._say(key[0], name, resource, note, told)
        except (ApiError, ApiUnavailable) as error:
            _log.warning("%s: event %s (%s) was not posted: %s", "/".join(key), note.reason, note.message, error)

    def forget(self, key: tuple[str, str]) -> None:
        self._told.pop(key, None)

    async def _say(self, namespace: str, name: str, resource: Manifest, note: Note, told: _Told) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        count = told.counts.get(name, 0)
        if count == 0:
            try:
                await self._cluster.create(_event(namespace, name, resource, note, now))
                told.counts[name] = 1
                return
            except ApiError as error:
                if error.status != _CONFLICT:
                    raise
        patch: Manifest = {"message": note.message, "lastTimestamp": now}
        if count:
            patch["count"] = count + 1
        try:
            after = await self._cluster.merge("Event", namespace, name, patch)
        except ApiError as error:
            if error.status != 404:
                raise
            after = await self._cluster.create(_event(namespace, name, resource, note, now))  # it had expired
        told.counts[name] = int(after.get("count") or 1)


def _may_speak(told: _Told) -> bool:
    now = clock()
    told.left = min(BURST, told.left + (now - told.counted_at) / REFILL_S)
    told.counted_at = now
    if told.left < 1:
        return False
    told.left -= 1
    return True


def _name(metadata: Manifest, note: Note) -> str:
    said = "\0".join((metadata["uid"], note.condition, note.type, note.reason))
    return f"{metadata['name']}.{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _event(namespace: str, name: str, resource: Manifest, note: Note, now: str) -> Manifest:
    metadata = resource["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": namespace,
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "type": note.type,
        "reason": note.reason,
        "message": note.message,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "source": {"component": _COMPONENT},
        "reportingComponent": _COMPONENT,
        "reportingInstance": "",
    }
