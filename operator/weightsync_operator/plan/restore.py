"""When engines are restored from a checkpoint: nobody else can ever bring them up to date, and none holds the version. Pure.

An attempt makes a version of its own, with its own epoch: what the lost one held, nobody knows any more. Weights that some
engine still serves are never replaced by a checkpoint, which may be older. A view of the ledger is seconds old, so that the pod
asks once more before it pushes.
"""

from __future__ import annotations

import dataclasses

from weightsync.wire import ReplicaState
from weightsync_operator.api.names import ANNOTATION_TEMPLATE, LABEL_LOST_VERSION, Component
from weightsync_operator.api.status import TrainerStatus
from weightsync_operator.plan.actions import Action, Apply
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.build.inference import ENGINE
from weightsync_operator.plan.build.restore import FIELD, job_for_version, restore_hash
from weightsync_operator.plan.fleet import Fleet, named
from weightsync_operator.plan.gang import LATCHED, job_deletions
from weightsync_operator.plan.observed import (
    LedgerView,
    Seen,
    condition,
    container_states,
    has_ended,
    is_deleting,
    running_since,
)
from weightsync_operator.plan.render import stamped

SETTLE_S = 30.0
"""After a push that ended: engines resume and tell the ledger, and the view of it is seconds old."""
JOIN_S = 600.0
"""An engine whose process started less than so long ago may be about to join: pushed to later, it would need a peer that lends."""
LOOK_AGAIN_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreWish:
    """What the spec wants, and what is known besides the ledger."""

    template: Manifest | None
    """The Job that belongs to no version; None where no checkpoint is named."""
    suspend: bool
    quorum: int
    """Engines without which no push is committed."""
    pushed_at: float | None
    """When the last push ended, in seconds since the Unix epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restore:
    """What to do, and in words how it stands; no words while nothing is lost."""

    actions: tuple[Action, ...] = ()
    under_way: bool = False
    words: str = ""
    look_again_s: float | None = None


def step_restore(wish: RestoreWish, gang: TrainerStatus, fleet: Fleet, seen: Seen) -> Restore:
    """The next step."""
    jobs, ledger = seen.of_kind("Job", Component.RESTORE), seen.ledger
    if wish.suspend or gang.state not in LATCHED:
        return Restore(actions=job_deletions(jobs))
    if ledger is None or ledger.error:
        return Restore()  # nothing is known: an attempt that failed is kept, so that it is not repeated
    of_this = [job for job in jobs if _lost_version(job) == str(fleet.committed)]
    if _is_held(fleet):
        return Restore(actions=job_deletions(job for job in jobs if has_ended(job) or job in of_this))
    if all(map(has_ended, of_this)) and not _is_lost(fleet, ledger):
        return Restore(actions=job_deletions(job for job in jobs if has_ended(job) and job not in of_this))
    if wish.template is None:
        return Restore(actions=job_deletions(jobs), words=f"{FIELD} names nothing to restore it from")
    wanted = job_for_version(wish.template, fleet.committed)
    others = [job for job in jobs if job["metadata"]["name"] != wanted["metadata"]["name"]]
    if others:
        outdated = [job for job in others if _is_outdated(job, wish.template)]
        waits = named(tuple(job["metadata"]["name"] for job in others))
        return Restore(actions=job_deletions(outdated), under_way=True, words=f"waits for Job {waits} to end")
    return _attempt(wanted, wish, fleet, seen, ledger)


def _is_held(fleet: Fleet) -> bool:
    """Whether some engine holds the committed version; one that was never pushed is in spec.model."""
    return fleet.committed == 0 or fleet.wanted == 0 or fleet.numbers().current > 0


def _is_lost(fleet: Fleet, ledger: LedgerView) -> bool:
    """Of a version that no engine is seen to hold: none is about to resume with it, and none serves another that may be served.

    Engines of a ledger that lost its data serve the model as loaded, and believe that it is the newest.
    """
    resuming = any(view.state in (ReplicaState.OPEN, ReplicaState.VERIFIED) for view in fleet.replicas)
    return not resuming and (fleet.ready == 0 or ledger.version < fleet.committed)


def _attempt(wanted: Manifest, wish: RestoreWish, fleet: Fleet, seen: Seen, ledger: LedgerView) -> Restore:
    name = wanted["metadata"]["name"]
    job = seen.child("Job", name)
    if job is not None and condition(job, "Failed"):
        return Restore(words=f"Job {name} failed: {_why(seen)}; mend {FIELD}, or delete the Job to try again")
    if job is not None and condition(job, "Complete"):  # it found the version with an engine that has lost it since
        return Restore(actions=job_deletions([job]), under_way=True, words=f"Job {name} ended, and is made again")
    if job is not None:
        return Restore(under_way=True, words=f"Job {name} pushes the newest checkpoint{_pending(seen)}")
    if (waits_for := _waits_for(wish, seen, ledger)) is not None:
        words = f"before {FIELD} is pushed: {waits_for}"
        return Restore(under_way=True, words=words, look_again_s=LOOK_AGAIN_S)
    words = f"Job {name} is made to push the newest checkpoint"
    return Restore(actions=(Apply(manifest=stamped(wanted)),), under_way=True, words=words)


def _waits_for(wish: RestoreWish, seen: Seen, ledger: LedgerView) -> str | None:
    """Who might still have the version, or write; and who must be there to be written to."""
    ranks = tuple(pod["metadata"]["name"] for pod in seen.of_kind("Pod", Component.TRAINER) if not has_ended(pod))
    if ranks:
        return f"waits for {named(ranks)} to end"
    if wish.pushed_at is not None and seen.now - wish.pushed_at < SETTLE_S:
        return "the last push has only just ended"
    started = _started(seen, ledger)
    silent = tuple(name for name, at in started.items() if wish.pushed_at is None or at <= wish.pushed_at)
    if silent:
        return f"waits for {named(silent)}, whose heartbeat ended, to come back or to be replaced"
    joining = tuple(name for name, at in started.items() if seen.now - at < JOIN_S)
    if joining:
        return f"waits for {named(joining)} to join"
    live = [pod for pod in seen.of_kind("Pod", Component.INFERENCE) if pod["metadata"]["name"] in ledger.live]
    if len(live) < wish.quorum:
        return f"waits for engines to start: {len(live)} of the {wish.quorum} that a push needs are there"
    return None


def _started(seen: Seen, ledger: LedgerView) -> dict[str, float]:
    """When the processes of engines that run and are not heard of started.

    One that has run since before the last push may hold the version; its successor in the pod begins with the model as loaded.
    """
    silent = [
        pod
        for pod in seen.of_kind("Pod", Component.INFERENCE)
        if pod["metadata"]["name"] not in ledger.live and not is_deleting(pod)
    ]
    found = {pod["metadata"]["name"]: running_since(pod, ENGINE) for pod in silent}
    return {name: at for name, at in found.items() if at is not None}


def _is_outdated(job: Manifest, template: Manifest) -> bool:
    """One of an older spec is stopped; one of this spec has just made the version that was lost after it, and may end."""
    return has_ended(job) or job["metadata"].get("annotations", {}).get(ANNOTATION_TEMPLATE) != restore_hash(template)


def _lost_version(job: Manifest) -> str:
    return job["metadata"].get("labels", {}).get(LABEL_LOST_VERSION, "")


def _pending(seen: Seen) -> str:
    """Which pod has not started, and what the scheduler or the kubelet says of it."""
    for pod in seen.of_kind("Pod", Component.RESTORE):
        status = pod.get("status", {})
        if status.get("phase") == "Pending":
            waiting = [state["waiting"] for state in container_states(pod) if "waiting" in state]
            unscheduled = [
                c for c in status.get("conditions") or [] if (c["type"], c["status"]) == ("PodScheduled", "False")
            ]
            said = [*seen.restore_faults[-1:], *(each.get("message") for each in (*unscheduled, *waiting))]
            words = next((text for text in said if text), "")
            return f"; {pod['metadata']['name']} is Pending" + (f": {words}" if words else "")
    return ""


def _why(seen: Seen) -> str:
    """The last word of the attempt that failed last."""
    said = [
        (ended.get("finishedAt") or "", (ended.get("message") or "").strip() or f"exit code {ended.get('exitCode')}")
        for pod in seen.of_kind("Pod", Component.RESTORE)
        for ended in (state["terminated"] for state in container_states(pod) if "terminated" in state)
        if ended.get("exitCode") != 0
    ]
    return max(said, default=("", "its pods are gone"))[1].splitlines()[-1][:300]
