"""May a new spec come into force? First the API server judges its children, then the preflight pod the model. Pure.

Until both agree the last spec that passed stays in force, and a first one makes nothing but the preflight pod.
"""

from __future__ import annotations

import dataclasses
import json

from weightsync_operator.api.names import Reason
from weightsync_operator.api.status import PreflightError, PreflightStatus
from weightsync_operator.plan.actions import Action, Apply, Delete, DryRun
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.build.restore import job_for_version
from weightsync_operator.plan.build.trainer import job_for_epoch
from weightsync_operator.plan.observed import Seen, container_states, has_ended, is_deleting
from weightsync_operator.plan.render import Render, stamped

RETRY_S = 15.0
MOUNT_LOOK_AGAIN_S = 3.0
ERRORS_SHOWN = 5
_IMAGE_FAULTS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admission:
    """Where the candidate stands."""

    admitted: bool = False
    reason: Reason = Reason.VALID
    message: str = ""
    settled: bool = True
    """False while the answer is still to come."""
    preflight: PreflightStatus | None = None
    actions: tuple[Action, ...] = ()
    look_again_s: float | None = None


def step_admission(
    revision: str, rendered: Render, preflight_pod: Manifest, known: PreflightStatus | None, seen: Seen
) -> Admission:
    """The next step of admitting `revision`; `known` is the verdict in the status."""
    if seen.dry_run is None or seen.dry_run.revision != revision:
        jobs = [job_for_epoch(rendered.trainer, 0)]
        jobs += [] if rendered.restore is None else [job_for_version(rendered.restore, 0)]
        manifests = (*rendered.base, rendered.engines, *jobs, preflight_pod)
        return _waiting("the API server judges the children", known, DryRun(revision=revision, manifests=manifests))
    if seen.dry_run.message:
        message = f"{seen.dry_run.field}: {seen.dry_run.message}"
        return Admission(reason=Reason.SPEC_INVALID, message=message, preflight=known)
    key = preflight_pod["metadata"]["name"].rsplit("-", 1)[-1]
    if known is None or known.hash != key:
        return _ask(preflight_pod, key, known, seen)
    if not known.ok:
        return Admission(reason=Reason.PREFLIGHT_FAILED, message=_joined(known.errors), preflight=known)
    return Admission(admitted=True, preflight=known)


def _ask(pod: Manifest, key: str, known: PreflightStatus | None, seen: Seen) -> Admission:
    live = seen.child("Pod", pod["metadata"]["name"])
    if live is None:
        return _waiting("the preflight pod is being made", known, Apply(manifest=stamped(pod)))
    if is_deleting(live):
        return _waiting("the preflight pod is asked again", known, look_again_s=RETRY_S)
    if has_ended(live):
        return _answer(live, key, known)
    return _pending(live, pod, known, seen)


def _answer(live: Manifest, key: str, known: PreflightStatus | None) -> Admission:
    ended = next((state["terminated"] for state in container_states(live) if "terminated" in state), {})
    verdict = _parse(ended.get("message", ""), key)
    if verdict is not None:
        return Admission(settled=False, reason=Reason.PREFLIGHT_RUNNING, preflight=verdict, look_again_s=0)
    said = (ended.get("message") or "").strip() or (live.get("status", {}).get("message") or "").strip()
    words = (said or "it left no verdict").splitlines()
    message = (
        f"the preflight pod ended with {ended.get('exitCode', 'no exit code')} and is asked again: {words[-1][:300]}"
    )
    delete = Delete(kind="Pod", name=live["metadata"]["name"], uid=live["metadata"]["uid"])
    return _waiting(message, known, delete, look_again_s=RETRY_S)


def _parse(text: str, key: str) -> PreflightStatus | None:
    """The verdict in a termination message; None when there is none in it."""
    try:
        verdict = json.loads(text)
        errors = tuple(
            PreflightError(field=error["field"][:256], message=error["message"][:1024])
            for error in verdict["errors"][:16]
        )
        return PreflightStatus(hash=key, ok=bool(verdict["ok"]), errors=errors)
    except (ValueError, KeyError, TypeError):
        return None


def _pending(live: Manifest, pod: Manifest, known: PreflightStatus | None, seen: Seen) -> Admission:
    """Not started: say what the kubelet or the scheduler is missing, in terms of the spec."""
    field = json.loads(pod["spec"]["containers"][0]["env"][0]["value"])["modelField"]
    if seen.mount_faults:
        return _missing(Reason.MODEL_MISSING, f"{field}: {seen.mount_faults[-1]}", known)
    for state in container_states(live):
        waiting = state.get("waiting", {})
        if waiting.get("reason") in _IMAGE_FAULTS:
            message = f"spec.inference.image: {waiting.get('message', waiting['reason'])}"
            return _missing(Reason.IMAGE_MISSING, message, known)
    for entry in live.get("status", {}).get("conditions") or []:
        if entry["type"] == "PodScheduled" and entry["status"] == "False":
            words = entry.get("message", "")
            if "persistentvolumeclaim" in words:
                return _missing(Reason.MODEL_MISSING, f"{field}: {words}", known)
            return _waiting(f"the preflight pod is not scheduled: {words}", known, look_again_s=MOUNT_LOOK_AGAIN_S)
    return _waiting("the preflight pod runs", known, look_again_s=MOUNT_LOOK_AGAIN_S)


def _missing(reason: Reason, message: str, known: PreflightStatus | None) -> Admission:
    """Somebody has to bring something; the pod waits for it, and goes on by itself."""
    return Admission(reason=reason, message=message[:1024], preflight=known, look_again_s=MOUNT_LOOK_AGAIN_S)


def _waiting(
    message: str, known: PreflightStatus | None, *actions: Action, look_again_s: float | None = None
) -> Admission:
    return Admission(
        settled=False,
        reason=Reason.PREFLIGHT_RUNNING,
        message=message[:1024],
        preflight=known,
        actions=actions,
        look_again_s=look_again_s,
    )


def _joined(errors: tuple[PreflightError, ...]) -> str:
    shown = "; ".join(f"{error.field}: {error.message}" for error in errors[:ERRORS_SHOWN])
    more = len(errors) - ERRORS_SHOWN
    return (shown + (f"; and {more} more" if more > 0 else ""))[:1024]
