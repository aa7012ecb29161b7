"""How a resource with keys in an external Redis is let go: pods first, then keys, and never later than a deadline. Pure.

Only such a resource has a finalizer; with a managed Redis there is nothing that the garbage collector would not take.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from weightsync_operator.api.names import FINALIZER, Condition, Reason
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.api.status import WeightSyncStatus
from weightsync_operator.plan.actions import Delete
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.conditions import Verdict, with_verdict
from weightsync_operator.plan.fleet import named
from weightsync_operator.plan.observed import Seen, is_deleting, of_session, seconds

DEADLINE_S = 180.0
"""From the deletion on. A pod on a lost node and a Redis that is gone would else hold the resource, and its namespace, for ever."""
RETURN_S = 60.0
"""From the first look on: an operator that was away for the deadline still gives pods the time to end."""
LOOK_AGAIN_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """The next step of letting go."""

    actions: tuple[Delete, ...] = ()
    waits_for: str = ""
    """Pods that might still write keys."""
    overdue: bool = False
    """The deadline has passed: whatever is left, the finalizer goes."""


def wants_finalizer(spec: WeightSyncSpec) -> bool:
    """True when the operator has something to clear away that no ownerReference reaches."""
    return spec.redis.external is not None and spec.deletion_policy == "Delete"


def finalizer_patch(resource: Manifest, *, wanted: bool) -> dict[str, Any] | None:
    """Merge patch that adds or takes away ours and leaves those of others; None when it is as wanted."""
    metadata = resource["metadata"]
    there = metadata.get("finalizers") or []
    if (FINALIZER in there) == wanted:
        return None
    after = [*there, FINALIZER] if wanted else [name for name in there if name != FINALIZER]
    return {"metadata": {"finalizers": after, "resourceVersion": metadata["resourceVersion"]}}


def step_release(seen: Seen, first_seen_at: float) -> Release:
    """Take whatever writes keys away and wait for its pods: one that still writes would write keys anew.

    first_seen_at: when this operator first saw the deletion, in seconds since the epoch.
    """
    deleted_at = seconds(seen.resource["metadata"]["deletionTimestamp"])
    overdue = deleted_at is not None and seen.now >= max(deleted_at + DEADLINE_S, first_seen_at + RETURN_S)
    owners, pods = [*of_session(seen, "Job"), *of_session(seen, "StatefulSet")], of_session(seen, "Pod")
    return Release(
        actions=tuple(
            Delete(kind=owner["kind"], name=owner["metadata"]["name"], uid=owner["metadata"]["uid"], foreground=True)
            for owner in owners
            if not is_deleting(owner)
        ),
        waits_for=named(tuple(child["metadata"]["name"] for child in [*owners, *pods])),
        overdue=overdue,
    )


def releasing(resource: Manifest, left: str, now: float) -> WeightSyncStatus:
    """The status while something is left."""
    before = WeightSyncStatus.model_validate(resource.get("status") or {})
    verdict = Verdict(True, Reason.RELEASING, f"is deleted, and waits at most {DEADLINE_S:.0f} s for {left}")
    generation = resource["metadata"]["generation"]
    return with_verdict(before, Condition.PROGRESSING, verdict, generation=generation, now=now)
