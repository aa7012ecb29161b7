"""Engines of an old template are replaced within the budget, and only while somebody can bring their successors up to date."""

from __future__ import annotations

from typing import Any

import pytest

from tests.controlplane.builders import make_pod, make_seen
from weightsync_operator.api.names import Reason
from weightsync_operator.plan.actions import Evict
from weightsync_operator.plan.rollout import Rollout, step_rollout


def _engines(replicas: int, observed: int = 3) -> dict[str, Any]:
    return {
        "metadata": {"name": "ws-inference", "generation": 3},
        "spec": {"replicas": replicas},
        "status": {"observedGeneration": observed, "updateRevision": "new"},
    }


def _step(
    *pods: dict[str, Any], budget: int = 1, has_source: bool = True, observed: int = 3, lenders: str = ""
) -> Rollout:
    return step_rollout(
        _engines(len(pods), observed),
        make_seen(None, *pods),
        max_unavailable=budget,
        session="s",
        trainer_runs=has_source,
        lenders=frozenset(lenders),
    )


def _old(name: str, **fields: Any) -> dict[str, Any]:
    return make_pod(name, **{"revision": "old", "ready": True, "session": "s", **fields})


def _new(name: str, **fields: Any) -> dict[str, Any]:
    return make_pod(name, **{"revision": "new", "ready": True, "session": "s", **fields})


def _evicted(rollout: Rollout) -> list[str]:
    return [action.name for action in rollout.evictions if isinstance(action, Evict)]


def test_a_fleet_that_is_up_to_date_is_left_alone() -> None:
    assert _step(_new("a"), _new("b", ready=False)) == Rollout()


def test_at_most_the_budget_goes_at_once() -> None:
    pods = [_old(name) for name in "abcd"]
    assert _evicted(_step(*pods)) == ["a"]
    assert _evicted(_step(*pods, budget=3)) == ["a", "b", "c"]


def test_an_engine_that_is_not_ready_uses_up_the_budget() -> None:
    assert _evicted(_step(_new("a", ready=False), _old("b"), _old("c"))) == []
    assert _evicted(_step(_new("a", ready=False), _old("b"), _old("c"), budget=2)) == ["b"]


@pytest.mark.failure_mode(71)
def test_an_old_engine_that_is_not_ready_goes_whatever_the_budget() -> None:
    rollout = _step(_new("a", ready=False), _old("b", ready=False), _old("c", ready=False), has_source=False)
    assert _evicted(rollout) == ["b", "c"]


@pytest.mark.failure_mode(28)
def test_without_a_source_no_ready_engine_goes() -> None:
    rollout = _step(_old("a"), _old("b"), has_source=False)
    assert (_evicted(rollout), rollout.blocked, rollout.outdated) == ([], Reason.ROLLOUT_WAITS_FOR_SOURCE, ("a", "b"))


@pytest.mark.failure_mode(46)
def test_engines_of_another_session_go_even_without_a_source() -> None:
    assert _evicted(_step(_old("a", session="older"), _old("b", session="older"), has_source=False)) == ["a"]


def test_an_engine_on_its_way_out_is_not_evicted_again() -> None:
    assert _evicted(_step(_old("a", deleting=True), _old("b"))) == []


def test_nothing_is_judged_before_the_set_saw_its_new_template() -> None:
    assert _step(_old("a"), observed=2) == Rollout()


@pytest.mark.failure_mode(61)
def test_without_a_trainer_engines_go_while_a_peer_stays_that_has_the_version() -> None:
    """The last one that has it goes only when a successor has it; one that is up to date already spares none of the old."""
    assert _evicted(_step(_old("a"), _old("b"), has_source=False, lenders="ab", budget=2)) == ["a"]
    assert _evicted(_step(_old("a"), _old("b"), has_source=False, lenders="a")) == ["b"]
    assert _evicted(_step(_old("a"), has_source=False, lenders="a")) == []
    assert _evicted(_step(_new("a"), _old("b"), has_source=False, lenders="ab")) == ["b"]
    assert _step(_old("a"), has_source=False, lenders="a").blocked is Reason.ROLLOUT_WAITS_FOR_SOURCE
