"""The status is written when it differs, conditions at once and figures seldom."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from tests.controlplane.builders import make_context, make_resource
from weightsync_operator.api.status import ConditionStatus, InferenceStatus, VersionStatus, WeightSyncStatus
from weightsync_operator.metrics import Metrics
from weightsync_operator.report import FIGURES_PERIOD_S, Reporter, merge_patch

SYNCED = ConditionStatus(type="Synced", status="True", last_transition_time="2026-01-01T00:00:00Z", reason="InSync")


class _Cluster:
    """Keeps the status as the API server would."""

    def __init__(self) -> None:
        self.resource = make_resource(make_context())
        self.patches: list[dict[str, Any]] = []

    async def patch_status(self, namespace: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        self.patches.append(patch)
        _apply(self.resource["status"], patch["status"])
        return self.resource


def _apply(target: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            _apply(target.setdefault(key, {}), value)
        else:
            target[key] = value


def _status(committed: int = 0, condition: ConditionStatus = SYNCED) -> WeightSyncStatus:
    return WeightSyncStatus(version=VersionStatus(committed=committed), conditions=(condition,))


@pytest.fixture
def cluster() -> _Cluster:
    return _Cluster()


@pytest.fixture
def reporter(cluster: _Cluster) -> Reporter:
    return Reporter(cluster, Metrics())  # type: ignore[arg-type]


def _report(reporter: Reporter, cluster: _Cluster, status: WeightSyncStatus) -> float:
    return asyncio.run(reporter.report(cluster.resource, status))


@pytest.mark.failure_mode(39)
def test_what_stands_there_is_not_written_again(reporter: Reporter, cluster: _Cluster) -> None:
    assert _report(reporter, cluster, _status()) == math.inf
    assert _report(reporter, cluster, _status()) == math.inf
    assert len(cluster.patches) == 1


@pytest.mark.failure_mode(39)
def test_figures_wait_and_conditions_do_not(reporter: Reporter, cluster: _Cluster) -> None:
    _report(reporter, cluster, _status(1))
    assert 0 < _report(reporter, cluster, _status(2)) <= FIGURES_PERIOD_S
    assert len(cluster.patches) == 1
    behind = SYNCED.model_copy(update={"status": "False", "reason": "Behind"})
    assert _report(reporter, cluster, _status(2, behind)) == math.inf
    assert cluster.resource["status"]["version"]["committed"] == 2


def test_figures_are_written_when_their_time_has_come(
    reporter: Reporter, cluster: _Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    _report(reporter, cluster, _status(1))
    monkeypatch.setattr("weightsync_operator.report.FIGURES_PERIOD_S", 0.0)
    assert _report(reporter, cluster, _status(2)) == math.inf
    assert len(cluster.patches) == 2


def test_a_write_carries_only_the_difference_and_the_version_it_was_read_at(
    reporter: Reporter, cluster: _Cluster
) -> None:
    _report(reporter, cluster, _status())
    changed = _status().model_copy(update={"inference": InferenceStatus(replicas=2), "revision": "r"})
    _report(reporter, cluster, changed)
    assert cluster.patches[-1] == {
        "metadata": {"resourceVersion": "1"},
        "status": {"inference": {"replicas": 2}, "revision": "r"},
    }


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({}, {}, {}),
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1}, {}, {"a": None}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}, {"a": {"c": None, "d": 3}}),
        ({"a": [1, 2]}, {"a": [2]}, {"a": [2]}),
        ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
    ],
)
def test_the_merge_patch_leads_from_old_to_new(old: dict, new: dict, patch: dict) -> None:
    assert merge_patch(old, new) == patch
