"""The CustomResourceDefinition, as it stands in charts/weightsync/files/crd.yaml. Imports the models and their schema."""

from __future__ import annotations

from typing import Any

from weightsync_operator.api.fields import rules
from weightsync_operator.api.names import GROUP, KIND, PLURAL, VERSION
from weightsync_operator.api.schema import structural_schema, without_defaults
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.api.status import WeightSyncStatus

_NAME_RULE = (
    "self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    "metadata.name has at most 40 lower-case letters, digits and dashes and starts with a letter: children are named after it",
)

_COLUMNS = (
    ("Model", "string", ".status.model", 0, "Name of the served model"),
    ("Fabric", "string", ".status.fabric.profile", 0, "Fabric profile in force"),
    ("Version", "integer", ".status.version.committed", 0, "Committed weight version"),
    (
        "In-Sync",
        "string",
        '.status.conditions[?(@.type=="Synced")].status',
        0,
        "True when every engine serves that version",
    ),
    ("Last-Push", "date", ".status.lastPush.finishedAt", 0, "Time since the last push ended"),
    ("Throughput", "string", ".status.lastPush.throughput", 0, "Payload over the wire's time"),
    ("Ready", "integer", ".status.inference.ready", 0, "Engines that answer requests"),
    ("Trainer", "string", ".status.trainer.state", 1, "State of the trainer's gang"),
    ("Epoch", "integer", ".status.trainer.epoch", 1, "Incarnation of the trainer"),
    ("Reason", "string", '.status.conditions[?(@.type=="Synced")].message', 1, "Why it is in sync or not"),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since it was created"),
)


def custom_resource_definition() -> dict[str, Any]:
    """The whole CRD as plain data."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": "weightsync",
                "shortNames": ["ws"],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [_version()],
        },
    }


def _version() -> dict[str, Any]:
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _root_schema()},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.inference.replicas",
                "statusReplicasPath": ".status.inference.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": [
            {"name": name, "type": type_, "jsonPath": path, "priority": priority, "description": description}
            for name, type_, path, priority, description in _COLUMNS
        ],
    }


def _root_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "One model that is trained and served: its trainer, its engines, and the push of weights between them.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural_schema(WeightSyncSpec),
            "status": without_defaults(structural_schema(WeightSyncStatus)),
        },
        **rules(_NAME_RULE),
    }
