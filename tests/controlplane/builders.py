"""Short makers of specs, children and observations with sane defaults, for tests of the pure half."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from weightsync.wire import PushSummary, ReplicaStatus
from weightsync_operator.api.names import ANNOTATION_TEMPLATE, LABEL_EPOCH, LABEL_SESSION, Component
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.plan.build.auth import derive_passwords, secret
from weightsync_operator.plan.build.context import Context, Defaults, Owner, selector_labels
from weightsync_operator.plan.build.trainer import template_hash
from weightsync_operator.plan.decide import Wanted
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.fabric import FabricChoice
from weightsync_operator.plan.observed import LedgerView, Seen
from weightsync_operator.plan.render import render, revision_of, stamped

NOW = 1_800_000_000.0
KEY = b"0123456789abcdef0123456789abcdef"
UID = "0b6e0f0e-1111-2222-3333-444455556666"
DEFAULTS = Defaults(
    runtime_image="test/runtime:1",
    redis_image="test/redis:1",
    model_express_image="test/mx:1",
    pull_policy="IfNotPresent",
)
MINIMAL: Mapping[str, Any] = {"model": {"hostPath": "/models/tiny"}, "trainer": {"command": ["python", "train.py"]}}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, map by map."""
    out = copy.deepcopy(dict(base))
    for key, value in over.items():
        inner = out.get(key)
        out[key] = merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return out


def make_spec(**over: Any) -> WeightSyncSpec:
    """The minimal spec with camelCase fields laid over it."""
    return WeightSyncSpec.model_validate(merged(MINIMAL, over))


def make_context(
    name: str = "ws",
    *,
    namespace: str = "ns",
    chosen: FabricChoice | SpecError | None = None,
    token_review: bool = False,
    **over: Any,
) -> Context:
    return Context(
        owner=Owner(name=name, namespace=namespace, uid=UID),
        spec=make_spec(**over),
        defaults=dataclasses.replace(DEFAULTS, token_review=token_review),
        auth=derive_passwords(KEY, UID).fingerprint,
        chosen=chosen,
    )


def make_wanted(ctx: Context | None = None, *, in_force: Context | None = None) -> Wanted:
    """What `ctx` asks for, with `in_force` (the same by default) admitted before."""
    ctx = ctx or make_context()
    admitted = in_force or ctx
    fresh, stored = render(ctx), render(admitted)
    return Wanted(
        ctx=ctx,
        secret=secret(ctx.owner, derive_passwords(KEY, UID), ctx.spec),
        revision=revision_of(ctx.spec, ctx.auth),
        fresh=fresh,
        in_force=stored,
        in_force_revision=revision_of(admitted.spec, admitted.auth),
    )


def make_resource(ctx: Context, status: Mapping[str, Any] | None = None, generation: int = 1) -> dict[str, Any]:
    metadata = {"name": ctx.owner.name, "namespace": "ns", "uid": UID, "generation": generation, "resourceVersion": "1"}
    return {"metadata": metadata, "status": dict(status or {})}


def make_seen(ctx: Context | None = None, *children: Mapping[str, Any], **fields: Any) -> Seen:
    """An observation of the resource of `ctx` with these children."""
    status, generation = fields.pop("status", None), fields.pop("generation", 1)
    resource = make_resource(ctx or make_context(), status, generation)
    by_key = {(child["kind"], child["metadata"]["name"]): dict(child) for child in children}
    return Seen(resource=resource, children=by_key, **{"now": NOW, **fields})


def make_pod(
    name: str,
    component: Component = Component.INFERENCE,
    *,
    ready: bool = False,
    revision: str = "new",
    session: str = "",
    phase: str = "Running",
    exit_code: int | None = None,
    message: str = "",
    deleting: bool = False,
) -> dict[str, Any]:
    labels = {**selector_labels("ws", component), "controller-revision-hash": revision, LABEL_SESSION: session}
    metadata: dict[str, Any] = {"name": name, "uid": f"uid-{name}", "labels": labels}
    if deleting:
        metadata["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    state: dict[str, Any] = {}
    if exit_code is not None:
        state = {"terminated": {"exitCode": exit_code, "message": message, "reason": "Error"}}
    status = {
        "phase": phase,
        "conditions": [{"type": "Ready", "status": str(ready)}],
        "containerStatuses": [{"name": "main", "state": state}],
    }
    return {"kind": "Pod", "metadata": metadata, "spec": {"volumes": []}, "status": status}


def make_job(
    template: Mapping[str, Any], epoch: int, *, condition: str | None = None, deleting: bool = False
) -> dict[str, Any]:
    """The Job of an epoch as the API server shows it."""
    metadata: dict[str, Any] = {
        "name": f"ws-trainer-{epoch}",
        "uid": f"job-{epoch}",
        "labels": {**selector_labels("ws", Component.TRAINER), LABEL_EPOCH: str(epoch)},
        "annotations": {ANNOTATION_TEMPLATE: template_hash(dict(template))},
    }
    if deleting:
        metadata["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    conditions = [] if condition is None else [{"type": condition, "status": "True", "message": "a rank ended"}]
    return {"kind": "Job", "metadata": metadata, "status": {"conditions": conditions}}


def make_ledger(version: int = 0, replicas: Mapping[str, tuple[int, str]] | None = None, **fields: Any) -> LedgerView:
    """A ledger at `version` with replicas {name: (version, state)}, all alive; `lends` names those that lend."""
    lends = fields.pop("lends", ())
    records = tuple(
        ReplicaStatus(
            name=name,
            version=held,
            epoch=1,
            state=state,
            serving=state == "CLEAN",
            reason="" if state == "CLEAN" else "torn",
            lends=name in lends,
        )
        for name, (held, state) in (replicas or {}).items()
    )
    defaults = {
        "session": "s",
        "version": version,
        "published": version,
        "replicas": records,
        "live": frozenset(replicas or {}),
    }
    return LedgerView(**{**defaults, **fields})


def make_push(version: int = 1, outcome: str = "COMMIT", **fields: Any) -> PushSummary:
    defaults: dict[str, Any] = {
        "push_id": f"1.{version}.1",
        "epoch": 1,
        "version": version,
        "step": version,
        "outcome": outcome,
    }
    return PushSummary(
        **{**defaults, "seconds": 1.5, "gbps": 1.23456, "finished_at": NOW, "transports": ["tcp"], **fields}
    )


def applied(wanted: Wanted) -> list[dict[str, Any]]:
    """All children of the render in force as they stand after an apply, Deployments available."""
    if wanted.in_force is None:
        return []
    secrets = () if wanted.secret is None else (wanted.secret,)
    children = [stamped(manifest) for manifest in (*secrets, *wanted.in_force.base, wanted.in_force.engines)]
    for child in children:
        child["metadata"] |= {"uid": f"uid-{child['metadata']['name']}", "generation": 1}
        if child["kind"] == "Deployment":
            child["status"] = {"conditions": [{"type": "Available", "status": "True"}]}
        if child["kind"] == "StatefulSet":
            child["status"] = {"observedGeneration": 1, "updateRevision": "new"}
    return children


def without(wanted: Wanted, **fields: Any) -> Wanted:
    """`wanted` with fields replaced."""
    return dataclasses.replace(wanted, **fields)
