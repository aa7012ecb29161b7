"""When engines are restored from a checkpoint: nobody else can ever bring them up to date, and none holds the version. Pure.

An attempt makes a version of its own, with its own epoch: what the lost one held, nobody knows any more. Weights that some
engine still serves are never replaced by a checkpoint, which may be older.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from weightsync_operator.api.names import ANNOTATION_TEMPLATE, Component
from weightsync_operator.api.status import TrainerStatus
from weightsync_operator.plan.actions import Action, Apply, Delete
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.build.inference import ENGINE
from weightsync_operator.plan.build.restore import FIELD, job_for_version, restore_hash
from weightsync_operator.plan.fleet import LOST, Fleet, named
from weightsync_operator.plan.gang import LATCHED
from weightsync_operator.plan.observed import Seen, condition, container_states, has_ended, is_deleting, running_since
from weightsync_operator.plan.render import stamped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restore:
    """What to do, and in words how it stands; no words while nothing is lost."""

    actions: tuple[Action, ...] = ()
    under_way: bool = False
    words: str = ""


def step_restore(template: Manifest | None, gang: TrainerStatus, fleet: Fleet, seen: Seen, *, suspend: bool) -> Restore:
    """The next step. `template` is the Job that belongs to no version, None where no checkpoint is named."""
    jobs = seen.of_kind("Job", Component.RESTORE)
    if template is None or suspend or gang.state not in LATCHED:
        return Restore(actions=_deletions(jobs))
    if not _is_lost(fleet, seen):
        return Restore(actions=_deletions(job for job in jobs if has_ended(job)))
    wanted = job_for_version(template, fleet.committed)
    others = [job for job in jobs if job["metadata"]["name"] != wanted["metadata"]["name"]]
    if others:
        outdated = [job for job in others if _is_outdated(job, template)]
        waits = named(tuple(job["metadata"]["name"] for job in others))
        return Restore(actions=_deletions(outdated), under_way=True, words=f"waits for Job {waits} to end")
    return _attempt(wanted, fleet, seen)


def _is_lost(fleet: Fleet, seen: Seen) -> bool:
    """Whether a version was committed that no engine holds; not while the ledger is silent."""
    known = seen.ledger is not None and not seen.ledger.error
    return known and fleet.wanted > 0 and fleet.committed > 0 and fleet.numbers().current == 0


def _attempt(wanted: Manifest, fleet: Fleet, seen: Seen) -> Restore:
    name = wanted["metadata"]["name"]
    job = seen.child("Job", name)
    if job is not None and condition(job, "Failed"):
        return Restore(words=f"Job {name} failed: {_why(seen)}; mend {FIELD}, or delete the Job to try again")
    if job is not None:
        return Restore(under_way=True, words=f"Job {name} pushes the newest checkpoint{_pending(seen)}")
    if (waits_for := _waits_for(fleet, seen)) is not None:
        return Restore(under_way=True, words=f"before {FIELD} is pushed: {waits_for}")
    words = f"Job {name} is made to push the newest checkpoint"
    return Restore(actions=(Apply(manifest=stamped(wanted)),), under_way=True, words=words)


def _waits_for(fleet: Fleet, seen: Seen) -> str | None:
    """Who might still have the version, or write; and somebody must be there to be written to."""
    ranks = tuple(pod["metadata"]["name"] for pod in seen.of_kind("Pod", Component.TRAINER) if not has_ended(pod))
    if ranks:
        return f"waits for {named(ranks)} to end"
    silent = tuple(view.name for view in fleet.replicas if view.state == LOST and _may_hold(view.name, fleet, seen))
    if silent:
        return f"waits for {named(silent)}, whose heartbeat ended, to come back or to be replaced"
    live = seen.ledger is not None and any(view.name in seen.ledger.live for view in fleet.replicas)
    return None if live else "waits for an engine to start"


def _may_hold(replica: str, fleet: Fleet, seen: Seen) -> bool:
    """Whether the process that last said it holds the version still runs. Its successor in the pod has begun at version 0."""
    pod = seen.child("Pod", replica)
    since = None if pod is None or is_deleting(pod) else running_since(pod, ENGINE)
    records = () if seen.ledger is None else seen.ledger.replicas
    held = [record for record in records if record.name == replica and record.version >= fleet.committed]
    return since is not None and any(record.updated_at >= since for record in held)


def _is_outdated(job: Manifest, template: Manifest) -> bool:
    """One of an older spec is stopped; one of this spec has just made the version that was lost after it, and may end."""
    return has_ended(job) or job["metadata"].get("annotations", {}).get(ANNOTATION_TEMPLATE) != restore_hash(template)


def _pending(seen: Seen) -> str:
    """Which pod has not started, and what the scheduler says of it."""
    for pod in seen.of_kind("Pod", Component.RESTORE):
        if pod.get("status", {}).get("phase") == "Pending":
            conditions = pod["status"].get("conditions") or []
            words = [c.get("message", "") for c in conditions if (c["type"], c["status"]) == ("PodScheduled", "False")]
            return f"; {pod['metadata']['name']} is Pending" + (f": {words[0]}" if words else "")
    return ""


def _why(seen: Seen) -> str:
    """The last word of the attempt that ended last."""
    said = [
        (ended.get("finishedAt") or "", ended.get("message") or f"exit code {ended.get('exitCode')}")
        for pod in seen.of_kind("Pod", Component.RESTORE)
        for ended in (state["terminated"] for state in container_states(pod) if "terminated" in state)
    ]
    return max(said, default=("", "its pods are gone"))[1].strip().splitlines()[-1][:300]


def _deletions(jobs: Iterable[Manifest]) -> tuple[Action, ...]:
    return tuple(
        Delete(kind="Job", name=job["metadata"]["name"], uid=job["metadata"]["uid"], foreground=True)
        for job in jobs
        if not is_deleting(job)
    )
