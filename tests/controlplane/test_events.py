"""Events: told when a condition changes, one object a reason, and never a flood."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.controlplane.builders import make_context, make_resource
from weightsync_operator.api.names import API_VERSION
from weightsync_operator.api.status import ConditionStatus, WeightSyncStatus
from weightsync_operator.cluster import ApiError
from weightsync_operator.events import BURST, Events
from weightsync_operator.plan.notes import Note, notes


def _status(*conditions: tuple[str, str, str]) -> WeightSyncStatus:
    made = [ConditionStatus(type=t, status=s, reason=r, last_transition_time="x") for t, s, r in conditions]
    return WeightSyncStatus(conditions=tuple(made))


def _notes(before: tuple[str, str, str] | None, after: tuple[str, str, str]) -> list[tuple[str, str]]:
    stood = {} if before is None else _status(before).model_dump(by_alias=True)
    return [(note.type, note.reason) for note in notes(stood, _status(after))]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (None, ("SpecValid", "False", "SpecInvalid"), [("Warning", "SpecInvalid")]),
        (None, ("Degraded", "False", "Healthy"), []),
        (None, ("Available", "False", "NoEngineReady"), []),
        (None, ("LedgerReachable", "Unknown", "NotReadYet"), []),
        (("Available", "False", "NoEngineReady"), ("Available", "True", "EnginesReady"), [("Normal", "EnginesReady")]),
        (
            ("Available", "True", "EnginesReady"),
            ("Available", "False", "NoEngineReady"),
            [("Warning", "NoEngineReady")],
        ),
        (("Degraded", "True", "PushAborted"), ("Degraded", "True", "EnginesDirty"), [("Warning", "EnginesDirty")]),
        (("Degraded", "True", "PushAborted"), ("Degraded", "False", "Healthy"), [("Normal", "Healthy")]),
        (("LedgerReachable", "Unknown", "NotReadYet"), ("LedgerReachable", "True", "Reachable"), []),
        (
            ("LedgerReachable", "False", "Unreachable"),
            ("LedgerReachable", "True", "Reachable"),
            [("Normal", "Reachable")],
        ),
        (("Synced", "True", "InSync"), ("Synced", "False", "Behind"), []),
    ],
)
def test_what_is_told(before: tuple[str, str, str] | None, after: tuple[str, str, str], told: list) -> None:
    assert _notes(before, after) == told


@pytest.mark.parametrize("degraded", ["PushAborted", "EnginesDirty", "TrainerRestarting"])
def test_a_restart_of_the_gang_is_told_once_whatever_else_is_wrong(degraded: str) -> None:
    """What stands before it in Degraded hid it, for as long as it took."""
    before = [("Progressing", "False", "Stable"), ("Degraded", "True", "PushAborted")]
    after = [("Progressing", "True", "TrainerRestarting"), ("Degraded", "True", degraded)]
    told = notes(_status(*before).model_dump(by_alias=True), _status(*after))
    assert [note.type for note in told if note.reason == "TrainerRestarting"] == ["Warning"]
    assert notes(_status(*after).model_dump(by_alias=True), _status(*after)) == ()


@pytest.mark.failure_mode(39)
def test_what_stays_is_not_told_again() -> None:
    same = ("Degraded", "True", "EnginesDirty")
    assert _notes(same, same) == []


class _Cluster:
    """Keeps events as the API server would."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.requests = 0

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.requests += 1
        name = manifest["metadata"]["name"]
        if name in self.events:
            raise ApiError(409, "exists", {})
        self.events[name] = dict(manifest)
        return self.events[name]

    async def merge(self, kind: str, namespace: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        self.requests += 1
        if name not in self.events:
            raise ApiError(404, "gone", {})
        self.events[name] |= patch
        return self.events[name]


NOTE = Note(condition="Degraded", type="Warning", reason="PushAborted", message="version 3 was aborted")
RESOURCE = make_resource(make_context())


def _post(events: Events, times: int, note: Note = NOTE) -> None:
    async def scenario() -> None:
        for _ in range(times):
            await events.post(RESOURCE, note)

    asyncio.run(scenario())


def test_the_same_again_is_one_event_with_a_count() -> None:
    cluster = _Cluster()
    events = Events(cluster)  # type: ignore[arg-type]
    _post(events, 3)
    (event,) = cluster.events.values()
    assert (event["count"], event["reason"], event["message"]) == (3, NOTE.reason, NOTE.message)
    assert event["involvedObject"]["apiVersion"] == API_VERSION
    assert event["involvedObject"]["uid"] == RESOURCE["metadata"]["uid"]


def test_another_operator_goes_on_with_the_same_event_and_one_that_expired_is_made_again() -> None:
    cluster = _Cluster()
    _post(Events(cluster), 2)  # type: ignore[arg-type]
    second = Events(cluster)  # type: ignore[arg-type]
    _post(second, 2)
    assert [event["count"] for event in cluster.events.values()] == [3]
    cluster.events.clear()
    _post(second, 1)
    assert [event["count"] for event in cluster.events.values()] == [1]


@pytest.mark.failure_mode(39)
def test_a_resource_that_flaps_is_told_less_and_less() -> None:
    """Seen to fail without `_may_speak`."""
    cluster = _Cluster()
    _post(Events(cluster), 4 * BURST)  # type: ignore[arg-type]
    assert cluster.requests <= BURST + 1


def test_an_event_that_is_refused_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(_Cluster):
        async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
            raise ApiError(403, "the namespace is being terminated", {})

    _post(Events(Refusing()), 1)  # type: ignore[arg-type]
    assert "event PushAborted (version 3 was aborted) was not posted: 403" in caplog.text
