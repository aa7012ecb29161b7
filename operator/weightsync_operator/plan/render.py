"""All children of one spec, rendered once and kept in a ControllerRevision. Pure.

Drift repair re-applies the stored render; a new operator renders again on a change of the spec only, and so restarts nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from weightsync_operator.api.names import (
    ANNOTATION_AUTH,
    ANNOTATION_FABRIC,
    ANNOTATION_RENDER,
    LABEL_COMPONENT,
    Component,
)
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.plan.build import (
    config,
    devices,
    inference,
    modelexpress,
    network,
    policies,
    preflight,
    redis,
    restore,
    trainer,
)
from weightsync_operator.plan.build.context import Context, Manifest, owner_reference, selector_labels
from weightsync_operator.plan.fabric import PROFILES
from weightsync_operator.plan.hashing import digest

RENDER_FORMAT = 1
"""Counted up when the fields of `Render` change: stored renders of another format are not read."""

_LIVE_FIELDS = {"suspend": True, "inference": {"replicas"}, "trainer": {"restarts"}}
"""Fields that take effect without a new render: `kubectl scale` and suspend must not re-render the fleet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Render:
    """What one spec becomes. The Secret is not in it: passwords are derived afresh, never stored here."""

    session: str
    model_name: str
    profile: str
    transports: tuple[str, ...]
    base: tuple[Manifest, ...]
    """Account, contract, policies, Services, Redis, ModelExpress, the budget and claims, in the order in which they are applied.

    Redis's certificate is set when it is applied.
    """
    engines: Manifest
    """The StatefulSet; replicas are set when it is applied."""
    trainer: Manifest
    """The Job that belongs to no epoch yet."""
    trainer_hash: str
    """What Complete, Failed and the count of restarts belong to: spec.trainer and the session."""
    restore: Manifest | None = None
    """The Job that pushes a checkpoint and belongs to no version yet; renders from before it was known have none."""

    @property
    def contract_name(self) -> str:
        return self.names("ConfigMap")[0]

    def names(self, kind: str) -> tuple[str, ...]:
        """Names of the children of one kind."""
        return tuple(child["metadata"]["name"] for child in self.base if child["kind"] == kind)

    @property
    def enforces(self) -> bool:
        """Whether its ModelExpress checks who calls it."""
        return any(modelexpress.enforces(child) for child in self.base if child["kind"] == "Deployment")

    @property
    def ledger_access(self) -> dict[str, Any]:
        """Host, port, username and database of the Redis that the pods of this render use, and whether with TLS."""
        (document,) = (child["data"]["contract.json"] for child in self.base if child["kind"] == "ConfigMap")
        section = json.loads(document)["redis"]
        return {name: section[name] for name in ("host", "port", "username", "database")} | {"tls": "tls" in section}

    @property
    def certificate_secret(self) -> str:
        """Name of the Secret that its managed Redis takes its certificate from; empty for none."""
        return next((redis.certificate_secret_of(child) for child in self.base if _is_redis(child)), "")

    @property
    def auth(self) -> str:
        """Fingerprint of the passwords that it was rendered with."""
        metadata = self.engines["spec"]["template"]["metadata"]
        return (metadata.get("annotations") or {}).get(ANNOTATION_AUTH, "")  # a podTemplate may take it away

    @property
    def fabric_was_chosen(self) -> bool:
        """Whether `auto` chose the profile; a profile that was named came with fields that `auto` forbids."""
        return ANNOTATION_FABRIC in self.engines["metadata"].get("annotations", {})

    @property
    def fabric_reason(self) -> str:
        """Why this fabric is in force."""
        annotations = self.engines["metadata"].get("annotations", {})
        return annotations.get(ANNOTATION_FABRIC, PROFILES[self.profile].reason)

    def to_data(self) -> dict[str, Any]:
        """Shallow: `dataclasses.asdict` would copy every manifest, in 13 ms."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """A stored render of this format, as the API server gives it back."""
        lists = {"transports": tuple(data["transports"]), "base": tuple(data["base"])}
        return cls(**{**data, **lists})

    def comparable(self) -> dict[str, Any]:
        """The render with the live fields levelled, so that a scaled fleet is not a changed one.

        Shallow: each pass compares two of them, and `dataclasses.asdict` would copy every manifest (4 of a pass's 7 ms).
        """
        return {**vars(self), "engines": engines_at(self, 0)}


def revision_of(spec: WeightSyncSpec, auth: str) -> str:
    """Hash of what needs a render: the spec without its live fields, and the passwords' fingerprint."""
    return digest([RENDER_FORMAT, spec.model_dump(mode="json", exclude=_LIVE_FIELDS), auth], 10)


def render(ctx: Context) -> Render:
    """Every child of the spec. Raises SpecError if a podTemplate cannot be laid over, or `auto` found no fabric yet."""
    contract = config.config_map(ctx)
    contract_name = contract["metadata"]["name"]
    base = [
        network.service_account(ctx),
        contract,
        *policies.network_policies(ctx),
        *network.services(ctx),
        *_rendezvous(ctx),
        network.disruption_budget(ctx),
        *devices.claim_templates(ctx),
    ]
    trainer_identity = [ctx.spec.trainer.model_dump(mode="json", exclude={"restarts"}), ctx.session]
    return Render(
        session=ctx.session,
        model_name=ctx.model_name,
        profile=ctx.profile.name,
        transports=ctx.profile.transports,
        base=tuple(base),
        engines=inference.stateful_set(ctx, contract_name),
        trainer=trainer.job_template(ctx, contract_name),
        trainer_hash=digest(trainer_identity, 10),
        restore=restore.job_template(ctx, contract_name),
    )


def _rendezvous(ctx: Context) -> list[Manifest]:
    """Redis with its volume, and ModelExpress, as far as they are ours."""
    ours = [] if ctx.spec.redis.external is not None else [*redis.volume_claims(ctx), redis.deployment(ctx)]
    if ctx.spec.model_express.external is not None:
        return ours
    return [*ours, *modelexpress.accounts(ctx), modelexpress.deployment(ctx)]


def preflight_pod(ctx: Context, rendered: Render) -> Manifest:
    """The pod that judges the model of `ctx` before `rendered` comes into force."""
    return preflight.pod(ctx, rendered.engines)


def revision_object(ctx: Context, revision: str, rendered: Render, number: int) -> Manifest:
    """The ControllerRevision that keeps `rendered`."""
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": f"{ctx.owner.name}-{revision}",
            "namespace": ctx.owner.namespace,
            "labels": selector_labels(ctx.owner.name, Component.CONTRACT),
            "ownerReferences": [owner_reference(ctx.owner)],
        },
        "data": rendered.to_data(),
        "revision": number,
    }


def base_at(rendered: Render, certificate: str) -> tuple[Manifest, ...]:
    """`base`, with a managed Redis at this certificate: a renewed one restarts Redis and renders nothing else anew."""
    if not certificate or not rendered.ledger_access["tls"]:
        return rendered.base
    return tuple(redis.with_certificate(child, certificate) if _is_redis(child) else child for child in rendered.base)


def _is_redis(child: Manifest) -> bool:
    return child["kind"] == "Deployment" and child["metadata"]["labels"][LABEL_COMPONENT] == Component.REDIS


def engines_at(rendered: Render, replicas: int) -> Manifest:
    """The StatefulSet at this many replicas."""
    return {**rendered.engines, "spec": {**rendered.engines["spec"], "replicas": replicas}}


def stamped(manifest: Manifest) -> Manifest:
    """`manifest` with the hash of itself, by which a later pass knows that nothing has to be applied."""
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), ANNOTATION_RENDER: digest(manifest, 16)}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}
