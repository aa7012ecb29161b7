"""What one pass saw: the resource, its children, the ledger. Frozen, so that deciding is a function of it. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from weightsync.wire import PushSummary, ReplicaStatus
from weightsync_operator.api.names import LABEL_COMPONENT, SESSION_ROLES, Component
from weightsync_operator.plan.build.context import Manifest

ChildKey = tuple[str, str]
"""(kind, name)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerView:
    """The ledger of one session as last polled; after a failed poll it keeps the figures and says so."""

    session: str
    error: str = ""
    """Empty when the last poll succeeded."""
    epoch: int = 0
    version: int = 0
    published: int = 0
    replicas: tuple[ReplicaStatus, ...] = ()
    live: frozenset[str] = frozenset()
    """Replicas whose lease stands."""
    last_push: PushSummary | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRunVerdict:
    """What the API server said to the children of a revision."""

    revision: str
    field: str = ""
    message: str = ""
    """Empty when it would take them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """Everything a decision may depend on, the time included."""

    resource: Manifest
    children: Mapping[ChildKey, Manifest]
    """Objects that the resource controls, directly or through a Job or a set, by kind and name."""
    taken: frozenset[ChildKey] = frozenset()
    """Wanted names that belong to somebody else."""
    ledger: LedgerView | None = None
    dry_run: DryRunVerdict | None = None
    disrupted: frozenset[str] = frozenset()
    """UIDs of Jobs that lost a pod to an eviction, a preemption or a drain."""
    mount_faults: tuple[str, ...] = ()
    """The kubelet's words about volumes of the preflight pod."""
    restore_faults: tuple[str, ...] = ()
    """The same of a pod that pushes a checkpoint."""
    cluster_wide: bool = True
    """False where the operator has the rights of a Role only."""
    refused: str = ""
    """What the API server refused in the last pass; empty when it took everything."""
    now: float
    """Seconds since the Unix epoch."""

    def child(self, kind: str, name: str) -> Manifest | None:
        return self.children.get((kind, name))

    def of_kind(self, kind: str, component: Component) -> list[Manifest]:
        """Children of one kind and role, by name."""
        found = [
            child
            for (child_kind, _), child in self.children.items()
            if child_kind == kind and child["metadata"].get("labels", {}).get(LABEL_COMPONENT) == component
        ]
        return sorted(found, key=lambda child: child["metadata"]["name"])


def of_session(seen: Seen, kind: str) -> list[Manifest]:
    """Children of one kind that use a session's ledger: those of SESSION_ROLES."""
    return [child for role in SESSION_ROLES for child in seen.of_kind(kind, role)]


def belongs_to(child: Manifest, uid: str) -> bool:
    """True when the resource `uid` controls the child, or it is a pod of a session with the resource's labels.

    Those belong to their Job or set; also one whose owner is gone must be waited for.
    """
    references = child["metadata"].get("ownerReferences") or []
    controller = next((reference["uid"] for reference in references if reference.get("controller")), None)
    component = child["metadata"].get("labels", {}).get(LABEL_COMPONENT)
    return controller == uid or (child["kind"] == "Pod" and component in SESSION_ROLES)


def condition(child: Manifest, type_: str) -> bool:
    """True when the child's status has this condition with status True."""
    conditions = child.get("status", {}).get("conditions") or []
    return any(entry["type"] == type_ and entry["status"] == "True" for entry in conditions)


def has_ended(child: Manifest) -> bool:
    """True when a Job has finished, or all containers of a pod have."""
    if child["kind"] == "Pod":
        return child.get("status", {}).get("phase") in ("Succeeded", "Failed")
    return condition(child, "Complete") or condition(child, "Failed")


def disrupted_job(pod: Manifest) -> str | None:
    """UID of the trainer's Job if this pod of it is being evicted, preempted or drained."""
    labels = pod["metadata"].get("labels", {})
    if labels.get(LABEL_COMPONENT) != Component.TRAINER or not condition(pod, "DisruptionTarget"):
        return None
    owners = pod["metadata"].get("ownerReferences") or []
    return next((owner["uid"] for owner in owners if owner["kind"] == "Job"), None)


def disrupted_jobs(children: Mapping[ChildKey, Manifest]) -> set[str]:
    """UIDs of the Jobs of which a pod among these is being evicted, preempted or drained."""
    pods = (child for (kind, _), child in children.items() if kind == "Pod")
    return {uid for uid in map(disrupted_job, pods) if uid is not None}


def is_deleting(child: Manifest) -> bool:
    return "deletionTimestamp" in child["metadata"]


def is_ready(pod: Manifest) -> bool:
    return condition(pod, "Ready") and not is_deleting(pod)


def is_available(deployment: Manifest | None) -> bool:
    """True when the Deployment serves, whatever its generation."""
    return deployment is not None and condition(deployment, "Available")


def timestamp(seconds: float) -> str:
    """RFC 3339 with whole seconds, as Kubernetes writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: str | None) -> float | None:
    return None if text is None else datetime.fromisoformat(text).timestamp()


def running_since(pod: Manifest, container: str) -> float | None:
    """When the process of a container started, in seconds since the Unix epoch; None while there is none."""
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status["name"] == container and "running" in status.get("state", {}):
            return seconds(status["state"]["running"].get("startedAt"))
    return None


def container_states(pod: Manifest) -> list[dict[str, Any]]:
    return [status.get("state", {}) for status in pod.get("status", {}).get("containerStatuses") or []]
