"""What Prometheus reads: figures of the operator and of each resource, which go when it goes."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from weightsync_operator.api.status import (
    ConditionStatus,
    InferenceStatus,
    LastPush,
    ReplicaView,
    VersionStatus,
    WeightSyncStatus,
)
from weightsync_operator.cluster import ApiError
from weightsync_operator.metrics import Key, Metrics

DOCUMENT = Path(__file__).parents[2] / "docs/operations.md"
KEY: Key = ("team", "ws")


def _status(version: int = 7, outcome: str = "COMMIT", held: tuple[int | None, ...] = (7, 5, None)) -> WeightSyncStatus:
    return WeightSyncStatus(
        version=VersionStatus(published=version, committed=version),
        inference=InferenceStatus(replicas=3, ready=2, current=1),
        replicas=tuple(ReplicaView(name=f"e{i}", version=own, state="CLEAN") for i, own in enumerate(held)),
        last_push=LastPush(version=version, epoch=1, outcome=outcome, seconds=1.5, bytes=10, pause_seconds=0.2),
        conditions=(
            ConditionStatus(type="Synced", status="False", reason="Behind", last_transition_time="x"),
            ConditionStatus(type="SpecValid", status="Unknown", reason="PreflightRunning", last_transition_time="x"),
        ),
    )


def _samples(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    status, text = metrics.page()
    assert status == 200
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.values()))] = sample.value
    return found


def _of(metrics: Metrics, name: str, key: Key = KEY) -> float:
    return _samples(metrics)[f"weightsync_resource_{name}"][tuple(sorted(key))]


def test_the_figures_of_a_resource_are_those_of_its_status() -> None:
    metrics = Metrics()
    metrics.show(KEY, _status())
    assert (_of(metrics, "committed_version"), _of(metrics, "version_skew")) == (7, 2)
    assert (_of(metrics, "engines"), _of(metrics, "engines_ready"), _of(metrics, "engines_current")) == (3, 2, 1)
    assert (_of(metrics, "last_push_seconds"), _of(metrics, "last_push_bytes")) == (1.5, 10)
    assert _of(metrics, "synced") == 0
    assert math.isnan(_of(metrics, "spec_valid")), "unknown is neither"
    assert math.isnan(_of(metrics, "degraded")), "absent is neither"


def test_what_no_engine_reported_is_no_number() -> None:
    metrics = Metrics()
    metrics.show(KEY, WeightSyncStatus())
    assert math.isnan(_of(metrics, "version_skew"))
    assert math.isnan(_of(metrics, "last_push_seconds"))


def test_a_push_counts_once_however_often_it_is_shown() -> None:
    metrics = Metrics()
    for version, outcome in ((7, "COMMIT"), (7, "COMMIT"), (8, "ABORT"), (8, "COMMIT")):
        metrics.show(KEY, _status(version, outcome))
    assert _of(metrics, "pushes_total") == 3


def test_a_resource_that_is_gone_has_no_label_left() -> None:
    """Seen to fail without `errors.remove`."""
    metrics = Metrics()
    metrics.show(KEY, _status())
    _fail(metrics, ApiError(500, "broken", {}))
    assert any(KEY in labels for labels in _samples(metrics).values())
    metrics.forget(KEY)
    assert not any(set(KEY) <= set(labels) for name in _samples(metrics).values() for labels in name)


def test_failed_passes_are_counted_and_conflicts_are_not() -> None:
    metrics = Metrics()
    _fail(metrics, ApiError(409, "changed", {}))
    assert "weightsync_operator_reconcile_errors_total" not in _samples(metrics)
    _fail(metrics, ApiError(500, "broken", {}))
    _fail(metrics, KeyError("bug"))
    samples = _samples(metrics)
    assert samples["weightsync_operator_reconcile_errors_total"] == {KEY: 2}
    assert samples["weightsync_operator_reconcile_seconds_count"] == {(): 3}


def _fail(metrics: Metrics, error: Exception) -> None:
    async def reconcile(_: Key) -> float | None:
        raise error

    async def scenario() -> None:
        with pytest.raises(type(error)):
            await metrics.measured(reconcile)(KEY)

    asyncio.run(scenario())


def test_leadership_and_queue_are_asked_at_the_scrape() -> None:
    metrics, queue = Metrics(), [3]
    metrics.follow(queue_depth=lambda: queue[0], leads=lambda: queue[0] > 3)
    assert _samples(metrics)["weightsync_operator_queue_depth"] == {(): 3}
    queue[0] = 4
    assert _samples(metrics)["weightsync_operator_queue_depth"] == {(): 4}
    assert _samples(metrics)["weightsync_operator_leader"] == {(): 1}


def test_no_label_but_namespace_and_name() -> None:
    """Each further label would multiply the series of a thousand resources."""
    metrics = Metrics()
    metrics.show(KEY, _status())
    _fail(metrics, KeyError("bug"))
    labels = {name for family in metrics.registry.collect() for sample in family.samples for name in sample.labels}
    assert labels == {"namespace", "name", "le"}


def test_the_document_lists_the_metrics_that_there_are() -> None:
    documented = set(re.findall(r"`(weightsync_(?:operator|resource)_\w+)`", DOCUMENT.read_text()))
    metrics = Metrics()
    there = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in metrics.registry.collect()
        if family.name.startswith("weightsync")
    }
    assert documented == there
