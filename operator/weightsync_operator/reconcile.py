"""One pass over one WeightSync: observe, decide, act, report. Level-based: events, restarts and timers all lead here."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from weightsync_operator.api.names import (
    ANNOTATION_RENDER,
    FINALIZER,
    LABEL_COMPONENT,
    Component,
)
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.apply import carry_out, dry_run, is_taken
from weightsync_operator.cluster import ApiError, Cluster
from weightsync_operator.credentials import ca_of_managed, read_credentials
from weightsync_operator.listing import LISTED, SECRET, WATCHED, Key, Listings
from weightsync_operator.metrics import Metrics
from weightsync_operator.plan.actions import Action, Apply, Delete, DryRun
from weightsync_operator.plan.build.auth import (
    OPERATOR_USER,
    Credentials,
    secret,
)
from weightsync_operator.plan.build.context import Context, Manifest, Owner, split_address
from weightsync_operator.plan.decide import Step, Wanted, decide
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.fabric import FabricChoice, choose_fabric
from weightsync_operator.plan.invalid import invalid_spec
from weightsync_operator.plan.observed import ChildKey, DryRunVerdict, Seen, belongs_to, disrupted_jobs
from weightsync_operator.plan.release import finalizer_patch, wants_finalizer
from weightsync_operator.plan.render import Render, render, revision_of
from weightsync_operator.release import Releaser
from weightsync_operator.report import Reporter, status_patch
from weightsync_operator.settings import Settings
from weightsync_operator.telemetry import Ledger, Telemetry

OPTIONAL: Mapping[str, Callable[[WeightSyncSpec], bool]] = {
    "PersistentVolumeClaim": lambda spec: spec.redis.persistence is not None,
    "ResourceClaimTemplate": lambda spec: spec.fabric.profile == "dra",
}
"""Kinds that are listed only for a spec that makes them: an older API server does not know the last."""
GANG = ("Pod", "Job")
"""That the old gang is gone must be known, not remembered: a pass that does something has asked for these itself."""
_FORBIDDEN = 403
RESYNC_S = 60.0
"""Also a child whose deletion no event told is looked for; `listing.py` says after what time."""
RESYNC_JITTER = 0.2
"""A thousand resources that began together would otherwise be looked at together for ever."""


@dataclasses.dataclass
class Memory:
    """What one resource's passes remember; losing it costs work, never correctness."""

    kept: frozenset[str] = frozenset()
    """Of OPTIONAL, what a stored render has, or is left of one, whatever the newest spec wants."""
    dry_run: DryRunVerdict | None = None
    disrupted: set[str] = dataclasses.field(default_factory=set)
    refused: str = ""
    taken: frozenset[ChildKey] = frozenset()
    settled: dict[ChildKey, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Children whose last apply changed nothing: (resourceVersion, hash). Applying again would be a write for nothing."""


class Reconciler:
    """All passes over all resources share the cluster, what is known of children, the ledgers' views and the settings."""

    def __init__(
        self, cluster: Cluster, listings: Listings, telemetry: Telemetry, settings: Settings, metrics: Metrics
    ) -> None:
        self._cluster = cluster
        self._listings = listings
        self._telemetry = telemetry
        self._settings = settings
        self._reporter = Reporter(cluster, metrics)
        self._releaser = Releaser(cluster, telemetry, self._reporter)
        self._memories: dict[Key, Memory] = {}

    def note_disruption(self, key: Key, job_uid: str) -> None:
        """A pod of this Job was evicted, preempted or drained; by the time that the Job fails the pod may be gone."""
        self._memories.setdefault(key, Memory()).disrupted.add(job_uid)

    async def reconcile(self, key: Key) -> float | None:
        """Seconds until the next look, or None when the resource is gone. Raises ApiError and ApiUnavailable."""
        try:
            resource = await self._cluster.get("WeightSync", *key)
        except ApiError as error:
            if error.status != _FORBIDDEN or not self._settings.namespaces:
                raise
            self.forget(key)  # the Role went with its namespace
            return RESYNC_S
        if resource is None or "deletionTimestamp" in resource["metadata"]:
            wait_s = None if resource is None else await self._releaser.release(resource)
            if wait_s is None:
                self.forget(key)
            return wait_s
        memory = self._memories.setdefault(key, Memory())
        try:
            spec = WeightSyncSpec.model_validate(resource["spec"])
        except ValidationError as error:
            return min(RESYNC_S, await self._reporter.report(resource, invalid_spec(resource, error, time.time())))
        credentials = await self._credentials(resource, spec)
        if (patch := self._finalizer_patch(resource, spec, credentials)) is not None:
            await self._cluster.patch_resource(*key, patch)
            return 0.0
        return await self._do(key, *await self._look(key, resource, spec, credentials), memory)

    async def _look(
        self, key: Key, resource: Manifest, spec: WeightSyncSpec, credentials: Credentials | SpecError
    ) -> tuple[Seen, Step]:
        """What is there and what to do; where that is anything, from lists of the gang that this pass asked for."""
        memory = self._memories[key]
        fresh = not all(self._listings.remembers(key, kind) for kind in WATCHED)
        while True:
            children = await self._children(key, resource, spec, fresh=fresh)
            wanted = await self._wanted(resource, spec, credentials, children)
            memory.kept = _optional_kinds(children)
            seen = await self._see(key, resource, children, memory)
            if isinstance(credentials, Credentials):
                await self._follow_ledger(key, wanted, credentials)
            step = decide(wanted, seen)
            if fresh or (not step.actions and not status_patch(resource, step.status)):
                return seen, step
            fresh = True

    def forget(self, key: Key) -> None:
        """The resource is gone; its children are the garbage collector's."""
        self._memories.pop(key, None)
        self._listings.forget(key)
        self._telemetry.forget(key)
        self._reporter.forget(key)
        self._releaser.forget(key)

    def _finalizer_patch(
        self, resource: Manifest, spec: WeightSyncSpec, credentials: Credentials | SpecError
    ) -> dict[str, Any] | None:
        """The finalizer comes before any key; one whose Secret never was there has none, and nobody could delete it."""
        held = wants_finalizer(spec) and not self._settings.namespaces  # a Role goes before what a finalizer holds
        there = FINALIZER in resource["metadata"].get("finalizers", ())
        return finalizer_patch(resource, wanted=held and (there or isinstance(credentials, Credentials)))

    async def _credentials(self, resource: Manifest, spec: WeightSyncSpec) -> Credentials | SpecError:
        """What Redis is reached with, or which Secret is missing for it."""
        try:
            return await read_credentials(self._cluster, resource, spec, self._settings.operator_key)
        except SpecError as error:
            return error

    async def _wanted(
        self,
        resource: Manifest,
        spec: WeightSyncSpec,
        credentials: Credentials | SpecError,
        children: Mapping[ChildKey, Manifest],
    ) -> Wanted:
        metadata = resource["metadata"]
        owner = Owner(name=metadata["name"], namespace=metadata["namespace"], uid=metadata["uid"])
        noted = resource.get("status", {}).get("revision", "")
        in_force = _stored(children, owner.name, noted)
        known = credentials if isinstance(credentials, Credentials) else None
        # While a password cannot be read it is taken for the one that the pods have.
        auth = known.passwords.fingerprint if known is not None else "" if in_force is None else in_force.auth
        revision = revision_of(spec, auth)
        stored = _stored(children, owner.name, revision)
        if in_force is None and stored is not None:
            in_force, noted = stored, revision  # the status was lost; the render was not
        ctx = Context(
            owner=owner,
            spec=spec,
            defaults=self._settings.defaults,
            auth=auth,
            chosen=await self._chosen_fabric(spec, in_force),
        )
        return Wanted(
            ctx=ctx,
            secret=None if known is None else secret(owner, known.passwords, spec),
            certificate="" if known is None else known.certificate,
            missing_secret=None if isinstance(credentials, Credentials) else credentials,
            revision=revision,
            fresh=_fresh(ctx),
            stored=stored,
            in_force=in_force,
            in_force_revision="" if in_force is None else noted,
        )

    async def _chosen_fabric(self, spec: WeightSyncSpec, in_force: Render | None) -> FabricChoice | SpecError | None:
        """What `auto` became: what is in force already, else what the nodes offer now."""
        if spec.fabric.profile != "auto":
            return None
        if in_force is not None and in_force.fabric_was_chosen:
            return FabricChoice(profile=in_force.profile, reason=in_force.fabric_reason)
        unreadable = SpecError(
            "spec.fabric.profile", "auto reads the nodes, which this operator may not: name a profile"
        )
        if self._settings.namespaces:
            return unreadable
        gpus = spec.inference.gpus > 0 or spec.trainer.gpus_per_node > 0
        try:
            return choose_fabric(await self._cluster.nodes(), gpus=gpus, count=spec.fabric.count)
        except SpecError as error:
            return error
        except ApiError as error:
            if error.status != _FORBIDDEN:
                raise
            return unreadable

    async def _children(
        self, key: Key, resource: Manifest, spec: WeightSyncSpec, *, fresh: bool
    ) -> dict[ChildKey, Manifest]:
        """What the resource controls, and all pods with its labels; `fresh`: the gang is asked for, not remembered."""
        kept = self._memories[key].kept
        kinds = (*LISTED, *(kind for kind, used in OPTIONAL.items() if used(spec) or kind in kept), SECRET)
        lists = await asyncio.gather(
            *(self._listings.list(self._cluster, key, kind, fresh=fresh and kind in GANG) for kind in kinds)
        )
        uid = resource["metadata"]["uid"]
        return {
            (child["kind"], child["metadata"]["name"]): child
            for children in lists
            for child in children
            if belongs_to(child, uid)
        }

    async def _see(self, key: Key, resource: Manifest, children: Mapping[ChildKey, Manifest], memory: Memory) -> Seen:
        memory.disrupted |= disrupted_jobs(children)  # a list may be ahead of the watch, or the watch be down
        return Seen(
            resource=resource,
            children=children,
            taken=memory.taken,
            ledger=self._telemetry.view(key),
            dry_run=memory.dry_run,
            disrupted=frozenset(memory.disrupted),
            mount_faults=await self._mount_faults(key[0], children, Component.PREFLIGHT),
            restore_faults=await self._mount_faults(key[0], children, Component.RESTORE),
            refused=memory.refused,
            cluster_wide=not self._settings.namespaces,
            now=time.time(),
        )

    async def _mount_faults(
        self, namespace: str, children: Mapping[ChildKey, Manifest], component: Component
    ) -> tuple[str, ...]:
        """Asked only while a pod of this role does not start."""
        for (kind, _), child in children.items():
            labels = child["metadata"].get("labels", {})
            pending = child.get("status", {}).get("phase") == "Pending"
            if kind == "Pod" and labels.get(LABEL_COMPONENT) == component and pending:
                return await self._cluster.mount_faults(namespace, child["metadata"]["uid"])
        return ()

    async def _follow_ledger(self, key: Key, wanted: Wanted, credentials: Credentials) -> None:
        if wanted.in_force is None:
            return
        access = wanted.in_force.ledger_access  # of the pods that run: a newer spec may want it elsewhere
        if wanted.ctx.spec.redis.external is None:
            host, port = split_address(self._settings.ledger_address.format(name=key[1], namespace=key[0]))
            access |= {"host": host, "port": port, "username": OPERATOR_USER}
        password, ca, tls = credentials.passwords.operator, credentials.ca, wanted.ctx.spec.redis.tls
        name = wanted.in_force.certificate_secret
        if name and (tls is None or tls.secret_ref.name != name):
            ca = await ca_of_managed(self._cluster, key[0], name) or ca
        self._telemetry.watch(key, Ledger(**access, password=password, ca=ca, session=wanted.in_force.session))

    async def _do(self, key: Key, seen: Seen, step: Step, memory: Memory) -> float:
        """The status first: an epoch and a counted failure stand before anything is done because of them."""
        resync_s = RESYNC_S * random.uniform(1 - RESYNC_JITTER, 1 + RESYNC_JITTER)
        waits = [resync_s, await self._reporter.report(seen.resource, step.status)]
        waits += [] if step.look_again_s is None else [step.look_again_s]
        before = (memory.refused, memory.taken, memory.dry_run)
        applied = [action.manifest for action in step.actions if isinstance(action, Apply)]
        memory.taken = await self._taken(seen, applied)
        try:
            for action in step.actions:
                await self._act(key, action, seen, memory)
            memory.refused = ""
        except ApiError as error:
            if error.namespace_ends:
                return min(waits)  # the resource's own deletion is about to come
            memory.refused = str(error)[:900]
            raise
        # What was learnt belongs into the status, which was written before.
        return 0.0 if before != (memory.refused, memory.taken, memory.dry_run) else min(waits)

    async def _taken(self, seen: Seen, manifests: Iterable[Manifest]) -> frozenset[ChildKey]:
        """Children to be created whose names others use: they are left alone."""
        new = [manifest for manifest in manifests if _child(manifest) not in seen.children]
        uid = seen.resource["metadata"]["uid"]  # a list from before our own write may lack what is ours
        taken = await asyncio.gather(*(is_taken(self._cluster, manifest, uid) for manifest in new))
        return frozenset(_child(manifest) for manifest, others in zip(new, taken, strict=True) if others)

    async def _act(self, key: Key, action: Action, seen: Seen, memory: Memory) -> None:
        if isinstance(action, DryRun):
            memory.dry_run = await dry_run(self._cluster, action, seen.resource["metadata"]["uid"])
        elif not isinstance(action, Apply):
            kind = action.kind if isinstance(action, Delete) else "Pod"
            try:
                await carry_out(self._cluster, key[0], action)
            finally:
                self._listings.changed(key, kind)
        elif (child := _child(action.manifest)) not in memory.taken:
            live, stamp = seen.children.get(child), action.manifest["metadata"]["annotations"][ANNOTATION_RENDER]
            if live is not None and memory.settled.get(child) == (_version(live), stamp):
                return
            try:
                after = await self._cluster.apply(action.manifest)
            finally:  # also what was not answered may have been done
                self._listings.changed(key, child[0])
            if live is not None and _version(live) == _version(after):
                memory.settled[child] = (_version(after), stamp)


def _child(manifest: Manifest) -> ChildKey:
    return manifest["kind"], manifest["metadata"]["name"]


def _version(child: Manifest) -> str:
    return child["metadata"]["resourceVersion"]


def _stored(children: Mapping[ChildKey, Manifest], name: str, revision: str) -> Render | None:
    kept = children.get(("ControllerRevision", f"{name}-{revision}"))
    return None if kept is None else Render.from_data(kept["data"])


def _optional_kinds(children: Mapping[ChildKey, Manifest]) -> frozenset[str]:
    """Of OPTIONAL, kinds that some stored render made, or of which something is left.

    What a spec made does not go with the spec: pods of the old one hold its claims until they have ended.
    """
    renders = (child["data"]["base"] for (kind, _), child in children.items() if kind == "ControllerRevision")
    made = {manifest["kind"] for base in renders for manifest in base}
    return frozenset(OPTIONAL.keys() & (made | {kind for kind, _ in children}))


def _fresh(ctx: Context) -> Render | SpecError:
    try:
        return render(ctx)
    except SpecError as error:
        return error
