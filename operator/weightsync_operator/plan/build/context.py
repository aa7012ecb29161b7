"""What every child is built from, and the names by which children refer to each other. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from weightsync_operator.api.names import (
    API_VERSION,
    KIND,
    LABEL_COMPONENT,
    LABEL_INSTANCE,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    SESSION_ROLES,
    Component,
)
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.fabric import PROFILES, FabricChoice, FabricProfile, Memlock
from weightsync_operator.plan.hashing import digest

Manifest = dict[str, Any]

INFERENCE_PORT = 8000
REDIS_PORT = 6379
MODEL_EXPRESS_PORT = 8001
MODEL_EXPRESS_METRICS_PORT = 9401
MODEL_EXPRESS_AUDIENCE = "modelexpress"
"""Of the tokens that members show to ModelExpress; the API server itself takes none of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """The WeightSync that children belong to."""

    name: str
    namespace: str
    uid: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """The operator's own settings that a spec may override field by field."""

    runtime_image: str
    redis_image: str
    model_express_image: str
    pull_policy: str
    token_review: bool = False
    """Whether service accounts may ask the API server whose a token is: then ModelExpress admits members of its resource alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Owner, spec and defaults, with what follows from them."""

    owner: Owner
    spec: WeightSyncSpec
    defaults: Defaults
    auth: str
    """Fingerprint of the passwords, never the passwords."""
    chosen: FabricChoice | SpecError | None = None
    """What `auto` became, or why it became nothing; None when the spec names a profile."""

    @property
    def profile(self) -> FabricProfile:
        """The profile in force. Raises SpecError while `auto` is undecided."""
        if isinstance(self.chosen, SpecError):
            raise self.chosen
        return PROFILES[self.spec.fabric.profile if self.chosen is None else self.chosen.profile]

    @property
    def memlock(self) -> Memlock:
        wanted = self.spec.fabric.memlock
        return self.profile.memlock if wanted is None else Memlock(wanted)

    @property
    def model_name(self) -> str:
        """Name under which engines serve the model."""
        return self.spec.model.name or self.owner.name

    @property
    def model_path(self) -> str:
        """Folder of the model inside trainer and engine pods."""
        return self.spec.model.path or f"/models/{self.model_name.rsplit('/', 1)[-1]}"

    @property
    def session(self) -> str:
        """Ledger session: changes with identity and layout, not with replicas, resources or timeouts."""
        spec = self.spec
        identity = {
            "model": spec.model.model_dump(mode="json"),
            "format": spec.transfer.format,
            "parallelism": spec.inference.parallelism.model_dump(mode="json"),
            "trainer": [spec.trainer.nodes, spec.trainer.gpus_per_node],
        }
        # Fields that came after the first release, each only when it is set.
        if spec.trainer.parallelism is not None:
            identity["mesh"] = spec.trainer.parallelism.model_dump(mode="json")
        if spec.inference.quantization is not None:
            identity["quantization"] = spec.inference.quantization
        return f"{session_prefix(self.owner.uid)}{digest(identity, 8)}"

    @property
    def trainer_image(self) -> str:
        return self.spec.trainer.image or self.defaults.runtime_image

    @property
    def inference_image(self) -> str:
        return self.spec.inference.image or self.defaults.runtime_image

    @property
    def redis_address(self) -> tuple[str, int]:
        """Host and port of the ledger, as pods of the namespace reach it."""
        external = self.spec.redis.external
        return (self.child("redis"), REDIS_PORT) if external is None else split_address(external.address)

    @property
    def model_express_address(self) -> str:
        """host:port"""
        external = self.spec.model_express.external
        return f"{self.child('mx')}:{MODEL_EXPRESS_PORT}" if external is None else external.address

    @property
    def enforces(self) -> bool:
        """Whether ModelExpress is ours and can check who calls it."""
        return self.defaults.token_review and self.spec.model_express.external is None

    @property
    def session_roles(self) -> tuple[Component, ...]:
        """Roles of which this spec has pods that move weights."""
        return tuple(
            r for r in SESSION_ROLES if r is not Component.RESTORE or self.spec.transfer.checkpoint is not None
        )

    @property
    def trainer_metrics_ports(self) -> dict[str, int]:
        """Port of each rank of a trainer pod, by the name of the container's port; empty when metrics are off."""
        telemetry = self.spec.telemetry
        if telemetry is None or telemetry.metrics_port is None:
            return {}
        names = ["metrics", *(f"metrics-{rank}" for rank in range(1, self.spec.trainer.ranks_a_pod))]
        return {name: telemetry.metrics_port + rank for rank, name in enumerate(names)}

    def child(self, suffix: str) -> str:
        """Name of a child."""
        return f"{self.owner.name}-{suffix}"

    def labels(self, component: Component) -> dict[str, str]:
        """Labels of a child and of its pods."""
        return selector_labels(self.owner.name, component)

    def metadata(self, name: str, component: Component) -> Manifest:
        """metadata of a child, owned by the WeightSync so that deleting it leaves nothing."""
        return {
            "name": name,
            "namespace": self.owner.namespace,
            "labels": self.labels(component),
            "ownerReferences": [owner_reference(self.owner)],
        }


def session_prefix(uid: str) -> str:
    """What all sessions of one resource begin with, and no session of another."""
    return f"{uid.replace('-', '')[:12]}-"


def split_address(address: str) -> tuple[str, int]:
    """Host (an IPv6 address without its brackets) and port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def selector_labels(instance: str, component: Component) -> dict[str, str]:
    """Labels that never change over the life of a resource: Services and StatefulSets select by them."""
    return {LABEL_MANAGED_BY: MANAGED_BY, LABEL_INSTANCE: instance, LABEL_COMPONENT: component.value}


def owner_reference(owner: Owner) -> Manifest:
    """The controller reference by which children are collected with the WeightSync."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
