"""Replaces engines of an old template, at most maxUnavailable at a time, and only while somebody can bring the new ones up to
date. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set

from weightsync_operator.api.names import LABEL_SESSION, Component, Reason
from weightsync_operator.plan.actions import Action, Evict
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.observed import Seen, is_deleting, is_ready

_REVISION = "controller-revision-hash"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """What is left to replace, and the next steps of it."""

    outdated: tuple[str, ...] = ()
    evictions: tuple[Action, ...] = ()
    blocked: Reason | None = None


def step_rollout(
    engines: Manifest,
    seen: Seen,
    *,
    max_unavailable: int,
    session: str,
    trainer_runs: bool,
    lenders: Set[str] = frozenset(),
) -> Rollout:
    """Evictions that are allowed now, given the live StatefulSet `engines`.

    An outdated pod that is not ready is no loss and goes first, whatever the budget. A ready one of this session goes only
    while a trainer runs, or another of `lenders` stays that can bring its successor up to date: that starts from spec.model and
    could not become current otherwise. One of another session is replaced in any case: nobody will ever push to it again.
    """
    status = engines.get("status", {})
    if status.get("observedGeneration") != engines["metadata"].get("generation"):
        return Rollout()
    pods = seen.of_kind("Pod", Component.INFERENCE)
    update = status.get("updateRevision")
    outdated = [pod for pod in pods if pod["metadata"]["labels"].get(_REVISION) != update and not is_deleting(pod)]
    unready = [pod for pod in outdated if not is_ready(pod)]
    spared = _spared(outdated, lenders)
    replaceable = [
        pod
        for pod in outdated
        if is_ready(pod) and (trainer_runs or _session(pod) != session or spared not in (None, pod["metadata"]["name"]))
    ]
    missing = engines["spec"].get("replicas", 0) - sum(is_ready(pod) for pod in pods)
    chosen = unready + replaceable[: max(0, max_unavailable - max(0, missing))]
    waits = bool(outdated) and not unready and not replaceable
    return Rollout(
        outdated=tuple(pod["metadata"]["name"] for pod in outdated),
        evictions=tuple(Evict(name=pod["metadata"]["name"], uid=pod["metadata"]["uid"]) for pod in chosen),
        blocked=Reason.ROLLOUT_WAITS_FOR_SOURCE if waits else None,
    )


def _spared(outdated: list[Manifest], lenders: Set[str]) -> str | None:
    """A lender that must stay for as long as no trainer runs; None when there is none. One that is up to date already, if any."""
    old = {pod["metadata"]["name"] for pod in outdated}
    return max(lenders, key=lambda name: (name not in old, name), default=None)


def _session(pod: Manifest) -> str | None:
    return pod["metadata"]["labels"].get(LABEL_SESSION)
