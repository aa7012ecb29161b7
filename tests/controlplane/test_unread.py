"""A restarted operator that has not read the ledger yet leaves what the ledger said in the status."""

from __future__ import annotations

from typing import Any

import pytest

from tests.controlplane.builders import applied, make_context, make_ledger, make_pod, make_push, make_seen, make_wanted
from weightsync_operator.api.status import WeightSyncStatus
from weightsync_operator.plan.decide import Wanted, decide
from weightsync_operator.plan.observed import LedgerView
from weightsync_operator.report import merge_patch

CONTEXT = make_context(inference={"replicas": 2})
PODS = tuple(make_pod(f"ws-inference-{i}", ready=True) for i in range(2))


def _status(
    ledger: LedgerView | None, before: dict[str, Any], wanted: Wanted | None = None, pods: Any = PODS
) -> dict[str, Any]:
    wanted = wanted or make_wanted(CONTEXT)
    seen = make_seen(CONTEXT, *applied(wanted), *pods, ledger=ledger, status=before)
    return _json(decide(wanted, seen).status)


def _json(status: WeightSyncStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


@pytest.mark.failure_mode(39)
@pytest.mark.failure_mode(44)
@pytest.mark.parametrize(
    "ledger",
    [
        make_ledger(3, {"ws-inference-0": (3, "CLEAN"), "ws-inference-1": (3, "CLEAN")}, last_push=make_push(3)),
        make_ledger(
            3, {"ws-inference-0": (3, "CLEAN"), "ws-inference-1": (2, "DIRTY")}, last_push=make_push(4, "ABORT")
        ),
        make_ledger(3, {"ws-inference-0": (3, "CLEAN"), "ws-inference-1": (2, "CLEAN")}, error="connection refused"),
    ],
    ids=["in sync", "aborted and torn", "unreachable"],
)
def test_a_restart_writes_nothing_before_the_ledger_was_read(ledger: LedgerView) -> None:
    """Seen to fail without `keep_unread`: two writes a resource at each restart, and every alarm on Synced."""
    before = _status(ledger, {})
    before = _status(ledger, before)
    assert merge_patch(before, _status(None, before)) == {}


def test_what_was_never_read_is_unknown() -> None:
    conditions = {c["type"]: c["status"] for c in _status(None, {})["conditions"]}
    assert (conditions["Synced"], conditions["LedgerReachable"]) == ("Unknown", "Unknown")


def test_what_the_cluster_shows_is_shown_at_once() -> None:
    """Only the ledger's part is kept: pods that are gone are gone."""
    ledger = make_ledger(3, {"ws-inference-0": (3, "CLEAN"), "ws-inference-1": (3, "CLEAN")}, last_push=make_push(3))
    before = _status(ledger, _status(ledger, {}))
    now = _status(None, before, pods=PODS[:1])
    assert now["inference"] == {"replicas": 1, "ready": 1, "current": 1}
    assert [replica["name"] for replica in now["replicas"]] == ["ws-inference-0"]
