"""All children of one spec, rendered once and kept in a ControllerRevision. Pure.

Drift repair re-applies the stored render; a new operator renders again on a change of the spec only, and so restarts nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from weightsync_operator.api.names import ANNOTATION_RENDER, Component
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.plan.build import config, inference, modelexpress, network, preflight, redis, trainer
from weightsync_operator.plan.build.context import Context, Manifest, owner_reference, selector_labels
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
    """Account, contract, Services, Redis, ModelExpress and the budget, in the order in which they are applied."""
    engines: Manifest
    """The StatefulSet; replicas are set when it is applied."""
    trainer: Manifest
    """The Job that belongs to no epoch yet."""
    trainer_hash: str
    """What Complete, Failed and the count of restarts belong to: spec.trainer and the session."""

    @property
    def contract_name(self) -> str:
        return next(child["metadata"]["name"] for child in self.base if child["kind"] == "ConfigMap")

    def to_data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """A stored render of this format, as the API server gives it back."""
        lists = {"transports": tuple(data["transports"]), "base": tuple(data["base"])}
        return cls(**{**data, **lists})

    def comparable(self) -> dict[str, Any]:
        """The render with the live fields levelled, so that a scaled fleet is not a changed one."""
        return dataclasses.asdict(dataclasses.replace(self, engines=engines_at(self, 0)))


def revision_of(spec: WeightSyncSpec, auth: str) -> str:
    """Hash of what needs a render: the spec without its live fields, and the passwords' fingerprint."""
    return digest([RENDER_FORMAT, spec.model_dump(mode="json", exclude=_LIVE_FIELDS), auth], 10)


def render(ctx: Context) -> Render:
    """Every child of the spec. Raises SpecError if a podTemplate cannot be laid over."""
    contract = config.config_map(ctx)
    contract_name = contract["metadata"]["name"]
    base = [
        network.service_account(ctx),
        contract,
        *network.services(ctx),
        redis.deployment(ctx),
        modelexpress.deployment(ctx),
        network.disruption_budget(ctx),
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
    )


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


def engines_at(rendered: Render, replicas: int) -> Manifest:
    """The StatefulSet at this many replicas."""
    return {**rendered.engines, "spec": {**rendered.engines["spec"], "replicas": replicas}}


def stamped(manifest: Manifest) -> Manifest:
    """`manifest` with the hash of itself, by which a later pass knows that nothing has to be applied."""
    out = copy.deepcopy(manifest)
    out["metadata"].setdefault("annotations", {})[ANNOTATION_RENDER] = digest(manifest, 16)
    return out
