"""The API server's refusals are told in the words of the WeightSync's own fields."""

from __future__ import annotations

from typing import Any

import pytest

from weightsync_operator.apply import blame, is_spec_error
from weightsync_operator.cluster import ApiError

ENGINES = {"kind": "StatefulSet", "metadata": {"name": "ws-inference"}}
JOB = {"kind": "Job", "metadata": {"name": "ws-trainer-0"}}
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
        (REDIS, _invalid("spec.x", "no"), "spec", "Deployment ws-redis would be refused: spec.x: no"),
        (ENGINES, ApiError(400, "who knows", {}), "spec", "StatefulSet ws-inference would be refused: : who knows"),
    ],
)
def test_the_field_is_the_users_own(manifest: dict[str, Any], error: ApiError, field: str, message: str) -> None:
    assert blame(manifest, error) == (field, message)
