"""One pass over one WeightSync: observe, decide, act, report. Level-based: events, restarts and timers all lead here."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from weightsync_operator.api.names import (
    ANNOTATION_RENDER,
    LABEL_COMPONENT,
    LABEL_INSTANCE,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    Component,
)
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.apply import carry_out, dry_run
from weightsync_operator.cluster import ApiError, Cluster
from weightsync_operator.plan.actions import Action, Apply, DryRun
from weightsync_operator.plan.build.auth import OPERATOR_USER, Passwords, derive_passwords, secret
from weightsync_operator.plan.build.context import Context, Manifest, Owner
from weightsync_operator.plan.decide import Step, Wanted, decide
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.invalid import invalid_spec
from weightsync_operator.plan.observed import ChildKey, DryRunVerdict, Seen
from weightsync_operator.plan.render import Render, render, revision_of
from weightsync_operator.report import Reporter
from weightsync_operator.settings import Settings
from weightsync_operator.telemetry import Ledger, Telemetry

Key = tuple[str, str]
"""(namespace, name) of a WeightSync."""

LISTED = (
    *("ConfigMap", "Service", "ServiceAccount", "Pod", "Deployment"),
    *("StatefulSet", "ControllerRevision", "Job", "PodDisruptionBudget"),
)
"""Kinds that are listed by label. The Secret is read by its name, so that the operator may not list Secrets."""
RESYNC_S = 60.0
"""Also a child whose deletion no event told comes back within this time."""


@dataclasses.dataclass
class Memory:
    """What one resource's passes remember; losing it costs work, never correctness."""

    dry_run: DryRunVerdict | None = None
    disrupted: set[str] = dataclasses.field(default_factory=set)
    refused: str = ""
    taken: frozenset[ChildKey] = frozenset()
    settled: dict[ChildKey, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Children whose last apply changed nothing: (resourceVersion, hash). Applying again would be a write for nothing."""


class Reconciler:
    """All passes over all resources share the cluster, the ledgers' views and the settings."""

    def __init__(self, cluster: Cluster, telemetry: Telemetry, settings: Settings) -> None:
        self._cluster = cluster
        self._telemetry = telemetry
        self._settings = settings
        self._reporter = Reporter(cluster)
        self._memories: dict[Key, Memory] = {}

    def note_disruption(self, key: Key, job_uid: str) -> None:
        """A pod of this Job was evicted, preempted or drained; by the time that the Job fails the pod may be gone."""
        self._memories.setdefault(key, Memory()).disrupted.add(job_uid)

    async def reconcile(self, key: Key) -> float | None:
        """Seconds until the next look, or None when the resource is gone. Raises ApiError and ApiUnavailable."""
        resource = await self._cluster.get("WeightSync", *key)
        if resource is None or "deletionTimestamp" in resource["metadata"]:
            self.forget(key)
            return None
        memory = self._memories.setdefault(key, Memory())
        try:
            spec = WeightSyncSpec.model_validate(resource["spec"])
        except ValidationError as error:
            return min(RESYNC_S, await self._reporter.report(resource, invalid_spec(resource, error, time.time())))
        passwords = derive_passwords(self._settings.operator_key, resource["metadata"]["uid"])
        children = await self._children(key, resource)
        wanted = self._wanted(resource, spec, passwords, children)
        seen = await self._see(key, resource, children, memory)
        self._follow_ledger(key, wanted, passwords)
        return await self._do(key, seen, decide(wanted, seen), memory)

    def forget(self, key: Key) -> None:
        """The resource is gone; its children are the garbage collector's."""
        self._memories.pop(key, None)
        self._telemetry.forget(key)
        self._reporter.forget(key)

    def _wanted(
        self, resource: Manifest, spec: WeightSyncSpec, passwords: Passwords, children: Mapping[ChildKey, Manifest]
    ) -> Wanted:
        metadata = resource["metadata"]
        owner = Owner(name=metadata["name"], namespace=metadata["namespace"], uid=metadata["uid"])
        ctx = Context(owner=owner, spec=spec, defaults=self._settings.defaults, auth=passwords.fingerprint)
        revision = revision_of(spec, passwords.fingerprint)
        stored = _stored(children, owner.name, revision)
        noted = resource.get("status", {}).get("revision", "")
        in_force = _stored(children, owner.name, noted)
        if in_force is None and stored is not None:
            in_force, noted = stored, revision  # the status was lost; the render was not
        return Wanted(
            ctx=ctx,
            secret=secret(owner, passwords),
            revision=revision,
            fresh=_fresh(ctx),
            stored=stored,
            in_force=in_force,
            in_force_revision="" if in_force is None else noted,
        )

    async def _children(self, key: Key, resource: Manifest) -> dict[ChildKey, Manifest]:
        """What the resource controls, and all pods with its labels."""
        namespace, name = key
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY},{LABEL_INSTANCE}={name}"
        lists = await asyncio.gather(*(self._cluster.list(kind, namespace, selector) for kind in LISTED))
        auth = await self._cluster.get("Secret", namespace, f"{name}-auth")
        found = [child for children in lists for child in children] + ([] if auth is None else [auth])
        uid = resource["metadata"]["uid"]
        return {
            (child["kind"], child["metadata"]["name"]): child
            for child in found
            if _controller(child) == uid or _is_workload_pod(child)
        }

    async def _see(self, key: Key, resource: Manifest, children: Mapping[ChildKey, Manifest], memory: Memory) -> Seen:
        return Seen(
            resource=resource,
            children=children,
            taken=memory.taken,
            ledger=self._telemetry.view(key),
            dry_run=memory.dry_run,
            disrupted=frozenset(memory.disrupted),
            mount_faults=await self._mount_faults(key[0], children),
            refused=memory.refused,
            now=time.time(),
        )

    async def _mount_faults(self, namespace: str, children: Mapping[ChildKey, Manifest]) -> tuple[str, ...]:
        """Asked only while a preflight pod does not start."""
        for (kind, _), child in children.items():
            labels = child["metadata"].get("labels", {})
            pending = child.get("status", {}).get("phase") == "Pending"
            if kind == "Pod" and labels.get(LABEL_COMPONENT) == Component.PREFLIGHT and pending:
                return await self._cluster.mount_faults(namespace, child["metadata"]["uid"])
        return ()

    def _follow_ledger(self, key: Key, wanted: Wanted, passwords: Passwords) -> None:
        if wanted.in_force is None:
            return
        namespace, name = key
        host, _, port = self._settings.ledger_address.format(name=name, namespace=namespace).rpartition(":")
        ledger = Ledger(
            host=host,
            port=int(port),
            username=OPERATOR_USER,
            password=passwords.operator,
            session=wanted.in_force.session,
        )
        self._telemetry.watch(key, ledger)

    async def _do(self, key: Key, seen: Seen, step: Step, memory: Memory) -> float:
        """The status first: an epoch and a counted failure stand before anything is done because of them."""
        waits = [RESYNC_S, await self._reporter.report(seen.resource, step.status)]
        waits += [] if step.look_again_s is None else [step.look_again_s]
        before = (memory.refused, memory.taken, memory.dry_run)
        applied = [action.manifest for action in step.actions if isinstance(action, Apply)]
        memory.taken = await self._taken(key[0], seen, applied)
        try:
            for action in step.actions:
                await self._act(key[0], action, seen, memory)
            memory.refused = ""
        except ApiError as error:
            memory.refused = str(error)[:900]
            raise
        # What was learnt belongs into the status, which was written before.
        return 0.0 if before != (memory.refused, memory.taken, memory.dry_run) else min(waits)

    async def _taken(self, namespace: str, seen: Seen, manifests: Iterable[Manifest]) -> frozenset[ChildKey]:
        """Children to be created whose names others use: they are left alone."""
        new = [_child(manifest) for manifest in manifests if _child(manifest) not in seen.children]
        others = await asyncio.gather(*(self._cluster.get(kind, namespace, name) for kind, name in new))
        return frozenset(child for child, other in zip(new, others, strict=True) if other is not None)

    async def _act(self, namespace: str, action: Action, seen: Seen, memory: Memory) -> None:
        if isinstance(action, DryRun):
            taken = await self._taken(namespace, seen, action.manifests)
            free = tuple(manifest for manifest in action.manifests if _child(manifest) not in taken)
            memory.dry_run = await dry_run(self._cluster, dataclasses.replace(action, manifests=free))
        elif not isinstance(action, Apply):
            await carry_out(self._cluster, namespace, action)
        elif (child := _child(action.manifest)) not in memory.taken:
            live, stamp = seen.children.get(child), action.manifest["metadata"]["annotations"][ANNOTATION_RENDER]
            if live is not None and memory.settled.get(child) == (_version(live), stamp):
                return
            after = await self._cluster.apply(action.manifest)
            if live is not None and _version(live) == _version(after):
                memory.settled[child] = (_version(after), stamp)


def _child(manifest: Manifest) -> ChildKey:
    return manifest["kind"], manifest["metadata"]["name"]


def _version(child: Manifest) -> str:
    return child["metadata"]["resourceVersion"]


def _controller(child: Manifest) -> str | None:
    """UID of the object that controls this one."""
    references = child["metadata"].get("ownerReferences") or []
    return next((reference["uid"] for reference in references if reference.get("controller")), None)


def _is_workload_pod(child: Manifest) -> bool:
    """Trainers and engines belong to their Job or set; also one whose owner is gone must be waited for."""
    component = child["metadata"].get("labels", {}).get(LABEL_COMPONENT)
    return child["kind"] == "Pod" and component in (Component.TRAINER, Component.INFERENCE)


def _stored(children: Mapping[ChildKey, Manifest], name: str, revision: str) -> Render | None:
    kept = children.get(("ControllerRevision", f"{name}-{revision}"))
    return None if kept is None else Render.from_data(kept["data"])


def _fresh(ctx: Context) -> Render | SpecError:
    try:
        return render(ctx)
    except SpecError as error:
        return error
