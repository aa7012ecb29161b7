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
    Component,
)
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.plan.fabric import PROFILES, FabricProfile
from weightsync_operator.plan.hashing import digest

Manifest = dict[str, Any]

INFERENCE_PORT = 8000
REDIS_PORT = 6379
MODEL_EXPRESS_PORT = 8001
MODEL_EXPRESS_METRICS_PORT = 9401
TRAINER_PORT = 29500


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Owner, spec and defaults, with what follows from them."""

    owner: Owner
    spec: WeightSyncSpec
    defaults: Defaults
    auth: str
    """Fingerprint of the passwords, never the passwords."""

    @property
    def profile(self) -> FabricProfile:
        return PROFILES[self.spec.fabric.profile]

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
        return f"{self.owner.uid.replace('-', '')[:12]}-{digest(identity, 8)}"

    @property
    def trainer_image(self) -> str:
        return self.spec.trainer.image or self.defaults.runtime_image

    @property
    def inference_image(self) -> str:
        return self.spec.inference.image or self.defaults.runtime_image

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
