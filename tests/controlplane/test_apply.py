"""The API server's refusals are told in the words of the WeightSync's own fields."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from weightsync_operator.api.names import Component
from weightsync_operator.apply import blame, dry_run, is_spec_error
from weightsync_operator.cluster import ApiError
from weightsync_operator.plan.actions import DryRun
from weightsync_operator.plan.build.context import selector_labels
from weightsync_operator.plan.observed import DryRunVerdict


def _child(kind: str, name: str, component: Component) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": name, "labels": selector_labels("ws", component)}}


ENGINES = _child("StatefulSet", "ws-inference", Component.INFERENCE)
JOB = _child("Job", "ws-trainer-0", Component.TRAINER)
RESTORE = _child("Job", "ws-restore-1234", Component.RESTORE)
REDIS = {"kind": "Deployment", "metadata": {"name": "ws-redis"}}
TYPO = (
    "failed to create typed patch object (ns/ws-inference; apps/v1, Kind=StatefulSet):"
    " .spec.template.spec.x: field not declared in schema"
)


def _invalid(field: str, message: str) -> ApiError:
    return ApiError(422, f"is invalid: {field}", {"details": {"causes": [{"field": field, "message": message}]}})


@pytest.mark.failure_mode(65)
@pytest.mark.parametrize(
    ("status", "message", "is_spec"),
    [
        (422, "invalid", True),
        (400, "bad", True),
        (404, "the server could not find the requested resource", True),
        (500, TYPO, True),
        (500, "etcdserver: request timed out", False),
        (403, "exceeded quota", False),
        (429, "later", False),
        (503, "away", False),
    ],
)
def test_a_typo_is_told_from_an_outage(status: int, message: str, is_spec: bool) -> None:
    assert is_spec_error(ApiError(status, message, {})) is is_spec


@pytest.mark.parametrize(
    ("manifest", "error", "field", "message"),
    [
        (ENGINES, ApiError(500, TYPO, {}), "spec.inference.podTemplate.spec.x", "field not declared in schema"),
        (
            JOB,
            _invalid("spec.template.spec.containers[1].image", "Required value"),
            "spec.trainer.podTemplate.spec.containers[1].image",
            "Required value",
        ),
        (
            RESTORE,
            _invalid("spec.template.spec.containers[0].image", "Required value"),
            "spec.transfer.checkpoint.podTemplate.spec.containers[0].image",
            "Required value",
        ),
        (REDIS, _invalid("spec.x", "no"), "spec", "Deployment ws-redis would be refused: spec.x: no"),
        (ENGINES, ApiError(400, "who knows", {}), "spec", "StatefulSet ws-inference would be refused: : who knows"),
    ],
)
def test_the_field_is_the_users_own(manifest: dict[str, Any], error: ApiError, field: str, message: str) -> None:
    assert blame(manifest, error) == (field, message)


class _Cluster:
    """Refuses one manifest; an object of that name is there or is not. Notes the names that it was asked for."""

    def __init__(self, refuses: str, there: dict[str, Any] | None) -> None:
        self._refuses, self._there = refuses, there
        self.asked: list[str] = []

    async def apply(self, manifest: dict[str, Any], *, dry_run: bool) -> None:
        assert dry_run
        if manifest["metadata"]["name"] == self._refuses:
            raise _invalid("metadata.ownerReferences", "Only one reference can have Controller set to true")

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self.asked.append(name)
        return self._there


def _object(controller: str) -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"ownerReferences": [{"uid": controller, "controller": True}]}}


@pytest.mark.parametrize(
    ("there", "is_refused"),
    [(None, True), (_object("mine"), True), (_object("other"), False), ({"kind": "Service", "metadata": {}}, False)],
)
def test_what_is_said_of_somebody_elses_object_is_no_word_about_the_spec(
    there: dict[str, Any] | None, is_refused: bool
) -> None:
    """Such a name is told as NameTaken once the spec is in force, and holds up nothing else."""
    names = ("ws-mx", "ws-redis", "ws-inference")
    manifests = tuple({"kind": "Service", "metadata": {"namespace": "ns", "name": name}} for name in names)
    cluster = _Cluster("ws-redis", there)
    action = DryRun(revision="r", manifests=manifests)
    verdict = asyncio.run(dry_run(cluster, action, "mine"))  # type: ignore[arg-type]
    assert (verdict != DryRunVerdict(revision="r")) == is_refused
    assert cluster.asked == ["ws-redis"], "only a refusal makes it ask whose it is"
