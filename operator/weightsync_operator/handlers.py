"""Thin Kopf handlers: events of WeightSyncs and of their children poke the queue. They change nothing and return nothing.

`on.event` alone, on purpose: with daemons, delete handlers or indices Kopf puts a finalizer on every resource.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kopf

from weightsync_operator.api.names import (
    GROUP,
    LABEL_COMPONENT,
    LABEL_INSTANCE,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    PLURAL,
    VERSION,
    Component,
)
from weightsync_operator.reconcile import Reconciler
from weightsync_operator.workers import Workers

WATCHED: tuple[tuple[str, str, str], ...] = (
    ("", "v1", "configmaps"),
    ("", "v1", "services"),
    ("", "v1", "pods"),
    ("apps", "v1", "deployments"),
    ("apps", "v1", "statefulsets"),
    ("batch", "v1", "jobs"),
    ("policy", "v1", "poddisruptionbudgets"),
)
"""Secrets, accounts and revisions are not watched: reading their names is enough, and the next look finds them missing."""


def operator_settings() -> kopf.OperatorSettings:
    """No peering, no events, no leftovers on objects; children are filtered by the API server."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.posting.enabled = False
    for group, version, plural in WATCHED:
        settings.watching.label_selectors[group, version, plural] = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
    return settings


def register(registry: kopf.OperatorRegistry, reconciler: Reconciler, workers: Workers) -> None:
    """Put the handlers on `registry`."""

    async def on_resource(*, namespace: str | None, name: str, **_: Any) -> None:
        workers.poke((str(namespace), name))

    async def on_child(*, namespace: str | None, labels: Mapping[str, str], body: Mapping[str, Any], **_: Any) -> None:
        key = (str(namespace), labels.get(LABEL_INSTANCE, ""))
        if body.get("kind") == "Pod" and (job_uid := _disrupted_job(body)) is not None:
            reconciler.note_disruption(key, job_uid)
        if key[1]:
            workers.poke(key)

    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry, id="resource")(on_resource)
    for group, version, plural in WATCHED:
        kopf.on.event(group, version, plural, registry=registry, id=plural)(on_child)


def _disrupted_job(pod: Mapping[str, Any]) -> str | None:
    """UID of the trainer's Job if this pod of it is being evicted, preempted or drained."""
    if pod["metadata"].get("labels", {}).get(LABEL_COMPONENT) != Component.TRAINER:
        return None
    conditions = pod.get("status", {}).get("conditions") or []
    if not any(entry["type"] == "DisruptionTarget" and entry["status"] == "True" for entry in conditions):
        return None
    owners = pod["metadata"].get("ownerReferences") or []
    return next((owner["uid"] for owner in owners if owner["kind"] == "Job"), None)
