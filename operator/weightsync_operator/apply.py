"""Takes away, lets the API server judge, and translates the API server's refusals into the fields of the spec."""

from __future__ import annotations

import re
from collections.abc import Mapping

from weightsync_operator.api.names import LABEL_COMPONENT, Component
from weightsync_operator.cluster import ApiError, Cluster
from weightsync_operator.plan.actions import Delete, DryRun, Evict
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.build.restore import FIELD as CHECKPOINT_FIELD
from weightsync_operator.plan.observed import DryRunVerdict, belongs_to

_TYPED_PATCH = re.compile(r"failed to create typed patch object \(.*?\): (?P<path>\.[^:]*): (?P<why>.*)", re.DOTALL)
_TEMPLATE_OWNERS: Mapping[tuple[str, str], str] = {
    ("StatefulSet", Component.INFERENCE): "spec.inference.podTemplate",
    ("Job", Component.TRAINER): "spec.trainer.podTemplate",
    ("Job", Component.RESTORE): f"{CHECKPOINT_FIELD}.podTemplate",
}
_INVALID = (400, 404, 422)
"""404: the API server does not know the kind, such as that of a claim before Kubernetes 1.34."""


async def carry_out(cluster: Cluster, namespace: str, action: Delete | Evict) -> None:
    """Take something away. Raises ApiError if that is refused for good."""
    match action:
        case Delete():
            await cluster.delete(action.kind, namespace, action.name, uid=action.uid, foreground=action.foreground)
        case Evict():
            await cluster.evict(namespace, action.name, uid=action.uid)


async def is_taken(cluster: Cluster, manifest: Manifest, uid: str) -> bool:
    """Whether an object of this name is there that the resource `uid` does not control."""
    metadata = manifest["metadata"]
    there = await cluster.get(manifest["kind"], metadata["namespace"], metadata["name"])
    return there is not None and not belongs_to(there, uid)


async def dry_run(cluster: Cluster, action: DryRun, uid: str) -> DryRunVerdict:
    """What the API server would say to each manifest; a refusal for another reason than the spec is raised.

    What it says of an object that the resource `uid` does not control is no word about the spec.
    """
    for manifest in action.manifests:
        try:
            await cluster.apply(manifest, dry_run=True)
        except ApiError as error:
            if not is_spec_error(error):
                raise
            if await is_taken(cluster, manifest, uid):
                continue
            field, message = blame(manifest, error)
            return DryRunVerdict(revision=action.revision, field=field, message=message)
    return DryRunVerdict(revision=action.revision)


def is_spec_error(error: ApiError) -> bool:
    """True when trying again cannot help. A typo in a pod template answers 500, as if the server were broken."""
    return error.status in _INVALID or (error.status == 500 and "failed to create typed patch" in error.message)


def blame(manifest: Manifest, error: ApiError) -> tuple[str, str]:
    """(field of the WeightSync, message) for a refused child."""
    path, why = _place(error)
    component = manifest["metadata"].get("labels", {}).get(LABEL_COMPONENT, "")
    owner = _TEMPLATE_OWNERS.get((manifest["kind"], component))
    if owner is not None and path.startswith("spec.template"):
        return owner + path.removeprefix("spec.template"), why[:900]
    return "spec", f"{manifest['kind']} {manifest['metadata']['name']} would be refused: {path}: {why}"[:900]


def _place(error: ApiError) -> tuple[str, str]:
    typed = _TYPED_PATCH.search(error.message)
    if typed is not None:
        return typed["path"].lstrip("."), typed["why"]
    causes = (error.body.get("details") or {}).get("causes") or []
    if causes:
        return str(causes[0].get("field", "")), str(causes[0].get("message", error.message))
    return "", error.message
