"""Lets a deleted resource with an external Redis go: its pods, its keys, its finalizer, and the last by a deadline in any case."""

from __future__ import annotations

import asyncio
import logging
import time

from pydantic import ValidationError

from weightsync.wire import KEY_PREFIX
from weightsync_operator.api.names import FINALIZER, LABEL_INSTANCE, LABEL_MANAGED_BY, MANAGED_BY
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.apply import carry_out
from weightsync_operator.cluster import Cluster
from weightsync_operator.credentials import read_external
from weightsync_operator.ledger_keys import clear_keys
from weightsync_operator.plan.build.auth import external_access
from weightsync_operator.plan.build.context import Manifest, session_prefix
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.notes import WARNING, Note
from weightsync_operator.plan.observed import Seen, belongs_to
from weightsync_operator.plan.release import (
    LOOK_AGAIN_S,
    finalizer_patch,
    releasing,
    step_release,
    wants_finalizer,
)
from weightsync_operator.report import Reporter
from weightsync_operator.telemetry import Ledger, Telemetry

_log = logging.getLogger(__name__)

_HOLDING = ("Job", "StatefulSet", "Pod")
"""Kinds that have to be gone before keys are: what runs writes them again."""


class Releaser:
    """Shares the cluster, the ledgers that are known and the statuses with the reconciler."""

    def __init__(self, cluster: Cluster, telemetry: Telemetry, reporter: Reporter) -> None:
        self._cluster = cluster
        self._telemetry = telemetry
        self._reporter = reporter
        self._first_seen: dict[tuple[str, str], tuple[str, float]] = {}
        """By (namespace, name) of a deleted resource: its uid, and when its deletion was first seen here."""

    async def release(self, resource: Manifest) -> float | None:
        """One pass over a deleted resource: seconds until the next look, or None when nothing of ours holds it any more."""
        metadata = resource["metadata"]
        if FINALIZER not in metadata.get("finalizers", ()):
            return None
        spec = _spec(resource)
        if spec is not None and not wants_finalizer(spec):
            return await self._let_go(resource)
        step = step_release(await self._see(resource), self._note_seen(metadata))
        for action in step.actions:
            await carry_out(self._cluster, metadata["namespace"], action)
        left = [f"pods: {step.waits_for}"] if step.waits_for else []
        if not step.waits_for or step.overdue:
            left += filter(None, [await self._clear(resource, spec)])
        if left and not step.overdue:
            await self._reporter.report(resource, releasing(resource, "; ".join(left), time.time()))
            return LOOK_AGAIN_S
        if left:
            await self._tell(resource, "; ".join(left))
        return await self._let_go(resource)

    def forget(self, key: tuple[str, str]) -> None:
        """Nothing of ours holds the resource `key`, whoever let it go."""
        self._first_seen.pop(key, None)

    def _note_seen(self, metadata: Manifest) -> float:
        key, uid = (metadata["namespace"], metadata["name"]), metadata["uid"]
        known_uid, first_seen_at = self._first_seen.get(key, ("", 0.0))
        if known_uid != uid:
            first_seen_at = time.time()
            self._first_seen[key] = (uid, first_seen_at)
        return first_seen_at

    async def _see(self, resource: Manifest) -> Seen:
        namespace, name = resource["metadata"]["namespace"], resource["metadata"]["name"]
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY},{LABEL_INSTANCE}={name}"
        lists = await asyncio.gather(*(self._cluster.list(kind, namespace, selector) for kind in _HOLDING))
        children = {
            (child["kind"], child["metadata"]["name"]): child
            for found in lists
            for child in found
            if belongs_to(child, resource["metadata"]["uid"])
        }
        return Seen(resource=resource, children=children, now=time.time())

    async def _clear(self, resource: Manifest, spec: WeightSyncSpec | None) -> str:
        """Why keys are left; empty when none is."""
        if spec is None or spec.redis.external is None:
            return "the spec does not say where the keys are"
        metadata, external = resource["metadata"], spec.redis.external
        known = self._telemetry.ledger((metadata["namespace"], metadata["name"]))
        try:
            password, ca = await read_external(self._cluster, metadata["namespace"], external)
        except SpecError as error:
            # In a terminating namespace the Secret may go first; what was read before it went still opens the door.
            if known is None:
                return str(error)
            password, ca = known.password, known.ca
        ledger = Ledger(**external_access(external), password=password, ca=ca, session="")
        return await clear_keys(ledger, f"{KEY_PREFIX}{session_prefix(metadata['uid'])}")

    async def _let_go(self, resource: Manifest) -> None:
        patch, metadata = finalizer_patch(resource, wanted=False), resource["metadata"]
        if patch is not None:
            await self._cluster.patch_resource(metadata["namespace"], metadata["name"], patch)

    async def _tell(self, resource: Manifest, left: str) -> None:
        """The resource is gone a moment later; an event and a line in the log remain."""
        message = f"let go at the deadline, with something left: {left}"
        _log.warning("%s/%s: %s", resource["metadata"]["namespace"], resource["metadata"]["name"], message)
        await self._reporter.tell(resource, Note(condition="", type=WARNING, reason="KeysLeft", message=message[:1024]))


def _spec(resource: Manifest) -> WeightSyncSpec | None:
    """None for a spec that this operator cannot read."""
    try:
        return WeightSyncSpec.model_validate(resource["spec"])
    except ValidationError:
        return None
