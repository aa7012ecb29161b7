"""The trainer's life: which epoch runs, when the next one may, and when none ever will. Pure.

One transition a pass, and each is written to the status before anything is done because of it: an operator that dies in
between neither counts a failure twice nor starts an epoch that it did not note.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from weightsync_operator.api.names import ANNOTATION_TEMPLATE, LABEL_EPOCH, Component, TrainerState
from weightsync_operator.api.status import TrainerStatus
from weightsync_operator.plan.actions import Action, Apply, Delete
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.build.trainer import job_for_epoch, template_hash
from weightsync_operator.plan.observed import (
    Seen,
    condition,
    container_states,
    has_ended,
    is_deleting,
    seconds,
    timestamp,
)
from weightsync_operator.plan.render import stamped

RESTART_DELAY_S = 5.0
MAX_RESTART_DELAY_S = 60.0
LOOK_AGAIN_S = 5.0
"""While pods are awaited; their events usually come first."""

LATCHED = (TrainerState.COMPLETE, TrainerState.FAILED)
"""Nothing but another spec.trainer, or a larger budget, starts a gang again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GangWish:
    """What the spec wants of the gang."""

    template: Manifest
    spec_hash: str
    restarts: int
    suspend: bool
    waiting_for: str
    """Names of what must be up first; empty when it is."""
    restores: bool = False
    """Whether pushes of a checkpoint may have taken epochs that only the ledger knows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GangStep:
    """The state to write, and what to do if it stands already."""

    status: TrainerStatus
    actions: tuple[Action, ...] = ()
    look_again_s: float | None = None


def step_gang(wish: GangWish, before: TrainerStatus, seen: Seen) -> GangStep:
    """The next transition of the gang."""
    jobs = seen.of_kind("Job", Component.TRAINER)
    status = _remembering(_for_spec(wish, before), jobs)
    if status.state is TrainerState.FAILED and status.restarts <= wish.restarts:
        status = _moved(status, TrainerState.STOPPING, "the restart budget was raised")
    if status.state in LATCHED:
        return GangStep(status=status)
    if wish.suspend and status.state is not TrainerState.SUSPENDED:
        return _suspend(status, jobs, seen)
    job = next((job for job in jobs if _epoch(job) == status.epoch), None)
    match status.state:
        case TrainerState.RUNNING | TrainerState.STARTING if job is not None:
            return _watch(wish, status, job, seen)
        case TrainerState.STARTING:
            return _start(wish, status, jobs, seen)
        case TrainerState.RUNNING:
            return GangStep(
                status=_moved(status, TrainerState.STOPPING, "its Job was deleted by somebody else"), look_again_s=0
            )
    return _settle(wish, status, jobs, seen)


def _for_spec(wish: GangWish, before: TrainerStatus) -> TrainerStatus:
    """Another spec.trainer starts with a fresh budget, and nothing is latched for it."""
    if before.spec_hash == wish.spec_hash:
        return before
    fresh = before.model_copy(update={"spec_hash": wish.spec_hash, "restarts": 0, "failed_at": None})
    if before.state in LATCHED:
        return _moved(fresh, TrainerState.STOPPING, "spec.trainer changed")
    return fresh


def _remembering(status: TrainerStatus, jobs: list[Manifest]) -> TrainerStatus:
    """A status that was lost must not lead to an epoch that already was."""
    known = max((_epoch(job) for job in jobs), default=0)
    return status if known <= status.epoch else status.model_copy(update={"epoch": known})


def _watch(wish: GangWish, status: TrainerStatus, job: Manifest, seen: Seen) -> GangStep:
    """The Job of this epoch exists."""
    if is_deleting(job):
        return GangStep(status=_moved(status, TrainerState.STOPPING, "its Job is being deleted"), look_again_s=0)
    if condition(job, "Complete"):
        return GangStep(status=_moved(status, TrainerState.COMPLETE, ""))
    # FailureTarget comes first; Failed only when the other ranks have ended, up to a grace period later.
    if condition(job, "FailureTarget") or condition(job, "Failed"):
        return _failed(wish, status, job, seen)
    if job["metadata"].get("annotations", {}).get(ANNOTATION_TEMPLATE) != template_hash(wish.template):
        return GangStep(status=_moved(status, TrainerState.STOPPING, "the spec changed"), look_again_s=0)
    return GangStep(status=_moved(status, TrainerState.RUNNING, ""))


def _failed(wish: GangWish, status: TrainerStatus, job: Manifest, seen: Seen) -> GangStep:
    if job["metadata"]["uid"] in seen.disrupted:
        reason = f"epoch {status.epoch} lost a pod to a disruption, which does not count"
        return GangStep(status=_moved(status, TrainerState.STOPPING, reason), look_again_s=0)
    restarts = status.restarts + 1
    status = status.model_copy(update={"restarts": restarts, "failed_at": timestamp(seen.now)})
    why = f"epoch {status.epoch} failed: {_why(job, seen)}"
    if restarts > wish.restarts:
        return GangStep(status=_moved(status, TrainerState.FAILED, f"{why}; spec.trainer.restarts is {wish.restarts}"))
    return GangStep(status=_moved(status, TrainerState.STOPPING, why), look_again_s=0)


def _why(job: Manifest, seen: Seen) -> str:
    """The first rank that ended badly, in one line."""
    for pod in sorted(_pods(seen), key=_finished_at):
        for container in pod.get("status", {}).get("containerStatuses") or []:
            ended = container.get("state", {}).get("terminated")
            if ended is not None and ended.get("exitCode") != 0:
                return f"{pod['metadata']['name']} exited with {ended['exitCode']} ({ended.get('reason', 'Error')})"
    reasons = [
        entry.get("message", "")
        for entry in job["status"]["conditions"]
        if entry["type"] in ("FailureTarget", "Failed")
    ]
    return reasons[0] if reasons else "its Job failed"


def _finished_at(pod: Manifest) -> str:
    ends = [state["terminated"].get("finishedAt") or "" for state in container_states(pod) if "terminated" in state]
    return min(ends, default="9999")


def _settle(wish: GangWish, status: TrainerStatus, jobs: list[Manifest], seen: Seen) -> GangStep:
    """Nothing of the gang is wanted as it is: clear the last epoch away, then note the next."""
    if jobs or _pods(seen) or _restoring(seen):
        return GangStep(status=_beyond_restores(status, seen), actions=job_deletions(jobs), look_again_s=LOOK_AGAIN_S)
    if wish.restores and status.epoch > 0 and seen.ledger is None:
        return GangStep(status=status, look_again_s=LOOK_AGAIN_S)
    if wish.suspend:
        return GangStep(status=_moved(status, TrainerState.SUSPENDED, ""))
    if wish.waiting_for:
        return GangStep(status=_moved(status, TrainerState.WAITING, f"waits for {wish.waiting_for}"))
    if (delay_s := _delay_left_s(status, seen.now)) > 0:
        return GangStep(status=_moved(status, TrainerState.WAITING, status.reason), look_again_s=delay_s)
    known = max(status.epoch, 0 if seen.ledger is None else seen.ledger.epoch)
    return GangStep(
        status=_moved(status.model_copy(update={"epoch": known + 1}), TrainerState.STARTING, ""), look_again_s=0
    )


def _start(wish: GangWish, status: TrainerStatus, jobs: list[Manifest], seen: Seen) -> GangStep:
    """The epoch is noted and its Job does not exist; anything of another epoch has to go first."""
    if jobs or _pods(seen) or _restoring(seen):
        return GangStep(status=status, actions=job_deletions(jobs), look_again_s=LOOK_AGAIN_S)
    return GangStep(status=status, actions=(Apply(manifest=stamped(job_for_epoch(wish.template, status.epoch))),))


def _suspend(status: TrainerStatus, jobs: list[Manifest], seen: Seen) -> GangStep:
    if jobs or _pods(seen):
        return GangStep(status=_moved(status, TrainerState.STOPPING, "suspended"), actions=job_deletions(jobs))
    return GangStep(status=_moved(status, TrainerState.SUSPENDED, ""))


def job_deletions(jobs: Iterable[Manifest]) -> tuple[Action, ...]:
    """Foreground: the Job stays until its pods are gone."""
    return tuple(
        Delete(kind="Job", name=job["metadata"]["name"], uid=job["metadata"]["uid"], foreground=True)
        for job in jobs
        if not is_deleting(job)
    )


def _delay_left_s(status: TrainerStatus, now: float) -> float:
    """The first restart is at once; each further one waits twice as long, up to a minute."""
    failed_at = seconds(status.failed_at)
    if failed_at is None or status.restarts <= 1:
        return 0.0
    delay_s = min(MAX_RESTART_DELAY_S, RESTART_DELAY_S * 2.0 ** min(status.restarts - 2, 10))
    return max(0.0, failed_at + delay_s - now)


def _pods(seen: Seen) -> list[Manifest]:
    return seen.of_kind("Pod", Component.TRAINER)


def _beyond_restores(status: TrainerStatus, seen: Seen) -> TrainerStatus:
    """Past the epoch that a push of a checkpoint has taken, or is about to take while our view of the ledger is from before."""
    if not _restoring(seen):
        return status
    taken = 1 + (0 if seen.ledger is None else seen.ledger.epoch)
    return status.model_copy(update={"epoch": max(status.epoch, taken)})


def _restoring(seen: Seen) -> bool:
    """A push of a checkpoint takes an epoch of its own, which must not be ours."""
    return any(not has_ended(child) for kind in ("Job", "Pod") for child in seen.of_kind(kind, Component.RESTORE))


def _epoch(job: Manifest) -> int:
    return int(job["metadata"]["labels"][LABEL_EPOCH])


def _moved(status: TrainerStatus, state: TrainerState, reason: str) -> TrainerStatus:
    return status.model_copy(update={"state": state, "reason": reason[:1024]})
