"""The decision as a whole: what is made when, what is repaired, what is left alone, and what the status says."""

from __future__ import annotations

import copy
from typing import Any

import pydantic
import pytest

from tests.controlplane.builders import (
    NOW,
    applied,
    make_context,
    make_job,
    make_ledger,
    make_pod,
    make_push,
    make_seen,
    make_wanted,
    without,
)
from weightsync.wire import Decision
from weightsync_operator.api.names import Component, Condition, Reason, TrainerState
from weightsync_operator.api.status import REPLICAS_SHOWN, ConditionStatus, TrainerStatus, WeightSyncStatus
from weightsync_operator.plan.actions import Action, Apply, Delete
from weightsync_operator.plan.decide import Step, Wanted, decide
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.invalid import invalid_spec
from weightsync_operator.plan.observed import DryRunVerdict
from weightsync_operator.plan.render import Render, preflight_pod, render

READY = [make_pod(f"ws-inference-{i}", ready=True) for i in range(2)]


def _running(wanted: Wanted, **trainer: Any) -> dict[str, Any]:
    """The status of a resource whose trainer runs."""
    assert wanted.in_force is not None
    defaults = {"epoch": 1, "state": TrainerState.RUNNING, "specHash": wanted.in_force.trainer_hash}
    status = WeightSyncStatus(
        revision=wanted.in_force_revision, trainer=TrainerStatus.model_validate({**defaults, **trainer})
    )
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def _job(wanted: Wanted, **fields: Any) -> dict[str, Any]:
    assert wanted.in_force is not None
    return make_job(wanted.in_force.trainer, 1, **fields)


def _wanted(**over: Any) -> Wanted:
    return make_wanted(make_context(**{"inference": {"replicas": 2}, **over}))


def _steady(
    *extra: dict[str, Any], wanted: Wanted | None = None, trainer: dict[str, Any] | None = None, **seen: Any
) -> Step:
    """A pass over a fleet of two that runs, with more children and facts."""
    wanted = wanted or _wanted()
    children = {(c["kind"], c["metadata"]["name"]): c for c in [*applied(wanted), _job(wanted), *READY, *extra]}
    return decide(wanted, make_seen(wanted.ctx, *children.values(), status=_running(wanted, **(trainer or {})), **seen))


def _condition(step: Step, type_: Condition) -> ConditionStatus:
    return next(condition for condition in step.status.conditions if condition.type == type_)


def _verdict(step: Step, type_: Condition) -> tuple[str, str]:
    condition = _condition(step, type_)
    return condition.status, condition.reason


def _kinds(actions: tuple[Action, ...]) -> list[str]:
    return [action.manifest["kind"] for action in actions if isinstance(action, Apply)]


def test_before_admission_nothing_is_made_but_the_question() -> None:
    wanted = without(_wanted(), in_force=None, in_force_revision="")
    step = decide(wanted, make_seen(wanted.ctx))
    assert _kinds(step.actions) == []
    assert _verdict(step, Condition.SPEC_VALID) == ("Unknown", Reason.PREFLIGHT_RUNNING)
    assert step.status.revision == ""


def test_a_spec_that_cannot_be_rendered_makes_nothing_and_names_the_field() -> None:
    wanted = without(
        _wanted(), fresh=SpecError("spec.trainer.podTemplate.x", "no"), in_force=None, in_force_revision=""
    )
    step = decide(wanted, make_seen(wanted.ctx))
    assert (step.actions, step.look_again_s) == ((), None)
    assert _condition(step, Condition.SPEC_VALID).message == "spec.trainer.podTemplate.x: no"
    assert _verdict(step, Condition.PROGRESSING)[0] == "False"


def test_an_admitted_spec_is_kept_first_and_applied_in_the_next_pass() -> None:
    wanted = without(_wanted(), stored=None, in_force=None, in_force_revision="")
    preflight = {"hash": _preflight_hash(wanted), "ok": True, "errors": []}
    seen = make_seen(wanted.ctx, status={"preflight": preflight}, dry_run=DryRunVerdict(revision=wanted.revision))
    step = decide(wanted, seen)
    assert _kinds(step.actions) == ["ControllerRevision"]
    assert (step.status.revision, step.look_again_s) == (wanted.revision, 0)


def _preflight_hash(wanted: Wanted) -> str:
    assert isinstance(wanted.fresh, Render)
    return preflight_pod(wanted.ctx, wanted.fresh)["metadata"]["name"].rsplit("-", 1)[-1]


def test_all_children_are_made_at_once_with_the_account_first() -> None:
    wanted = _wanted()
    step = decide(wanted, make_seen(wanted.ctx, status=_running(wanted)))
    kinds = _kinds(step.actions)
    assert kinds[:3] == ["ServiceAccount", "Secret", "ConfigMap"]
    assert kinds.count("Service") == 5
    assert kinds.count("Deployment") == 2
    assert kinds[-1] == "StatefulSet"


@pytest.mark.failure_mode(39)
def test_a_steady_fleet_needs_nothing_and_the_second_status_is_the_first() -> None:
    replicas = {"ws-inference-0": (4, "CLEAN"), "ws-inference-1": (4, "CLEAN")}
    wanted, ledger = _wanted(), make_ledger(4, replicas, last_push=make_push(4))
    first = _steady(wanted=wanted, ledger=ledger)
    assert first.actions == ()
    status = first.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    children = [*applied(wanted), _job(wanted), *READY]
    again = decide(wanted, make_seen(wanted.ctx, *children, status=status, ledger=ledger, now=NOW + 1000))
    assert (again.actions, again.status) == ((), first.status)


@pytest.mark.failure_mode(37)
def test_one_changed_child_is_the_only_one_repaired() -> None:
    wanted = _wanted()
    edited = copy.deepcopy(
        next(
            child
            for child in applied(wanted)
            if child["metadata"]["name"] == "ws-redis" and child["kind"] == "Deployment"
        )
    )
    edited["spec"]["replicas"] = 5
    (action,) = _steady(edited, wanted=wanted).actions
    assert isinstance(action, Apply)
    assert action.manifest["metadata"]["name"] == "ws-redis"


@pytest.mark.failure_mode(51)
def test_scaling_changes_the_set_and_nothing_else() -> None:
    in_force = make_context(inference={"replicas": 2})
    scaled = make_wanted(make_context(inference={"replicas": 5}), in_force=in_force)
    assert scaled.revision == scaled.in_force_revision
    (action,) = _steady(wanted=scaled, generation=9).actions if False else _scale(scaled, in_force)
    assert isinstance(action, Apply)
    assert (action.manifest["kind"], action.manifest["spec"]["replicas"]) == ("StatefulSet", 5)


def _scale(scaled: Wanted, in_force: Any) -> tuple[Action, ...]:
    children = [*applied(make_wanted(in_force)), _job(scaled), *READY]
    return decide(scaled, make_seen(scaled.ctx, *children, status=_running(scaled))).actions


@pytest.mark.failure_mode(42)
def test_suspend_is_one_decision_for_trainer_and_engines() -> None:
    in_force = make_context(inference={"replicas": 2})
    wanted = make_wanted(make_context(inference={"replicas": 2}, suspend=True), in_force=in_force)
    actions = _scale(wanted, in_force)
    scaled = [action.manifest["spec"]["replicas"] for action in actions if isinstance(action, Apply)]
    deleted = [action.name for action in actions if isinstance(action, Delete)]
    assert (scaled, deleted) == ([0], ["ws-trainer-1"])


@pytest.mark.failure_mode(42)
def test_suspended_is_told_only_when_everything_is_gone() -> None:
    wanted = _wanted(suspend=True)
    children = applied(wanted)
    going = decide(wanted, make_seen(wanted.ctx, *children, *READY, status=_running(wanted, state="Suspended")))
    gone = decide(wanted, make_seen(wanted.ctx, *children, status=_running(wanted, state="Suspended")))
    assert _verdict(going, Condition.SUSPENDED) == ("False", Reason.SUSPENDING)
    assert "ws-inference-0" in _condition(going, Condition.SUSPENDED).message
    assert _verdict(gone, Condition.SUSPENDED) == ("True", Reason.SUSPENDED)


def test_while_a_changed_spec_is_not_admitted_the_last_one_stays_in_force() -> None:
    old = make_context(inference={"replicas": 2})
    wanted = make_wanted(make_context(inference={"replicas": 3, "image": "broken"}), in_force=old)
    children = [child for child in applied(make_wanted(old)) if child["metadata"]["name"] != "ws-mx"]
    step = decide(wanted, make_seen(wanted.ctx, *children, _job(wanted), *READY, status=_running(wanted), generation=2))
    repaired = [action.manifest for action in step.actions if isinstance(action, Apply)]
    assert {manifest["metadata"]["name"] for manifest in repaired} == {"ws-mx", "ws-inference"}
    engines = next(manifest for manifest in repaired if manifest["kind"] == "StatefulSet")
    assert engines["spec"]["replicas"] == 3, "scaling is in force at once"
    assert engines["spec"]["template"]["spec"]["containers"][0]["image"] != "broken"
    assert step.status.revision == wanted.in_force_revision


@pytest.mark.failure_mode(44)
@pytest.mark.failure_mode(68)
def test_a_new_operator_applies_nothing_and_says_that_an_update_waits() -> None:
    wanted = _wanted()
    newer = make_context(inference={"replicas": 2}, trainer={"image": "a-newer-default"})
    step = _steady(wanted=without(wanted, fresh=render(newer)))
    assert _kinds(step.actions) == []
    assert _verdict(step, Condition.UPDATE_PENDING) == ("True", Reason.OPERATOR_CHANGED)
    assert _verdict(_steady(), Condition.UPDATE_PENDING) == ("False", Reason.UP_TO_DATE)


def test_going_back_to_an_earlier_spec_takes_its_earlier_render() -> None:
    earlier = render(make_context(trainer={"image": "as-it-was"}))
    wanted = without(_wanted(), stored=earlier)
    assert wanted.rendered is earlier


@pytest.mark.failure_mode(51)
def test_a_scaled_fleet_is_not_an_update() -> None:
    in_force = make_context(inference={"replicas": 2})
    scaled = make_wanted(make_context(inference={"replicas": 5}), in_force=in_force)
    step = decide(scaled, make_seen(scaled.ctx, *applied(make_wanted(in_force)), status=_running(scaled)))
    assert _verdict(step, Condition.UPDATE_PENDING) == ("False", Reason.UP_TO_DATE)


def test_contracts_go_when_no_pod_mounts_them() -> None:
    old = {
        "kind": "ConfigMap",
        "metadata": {"name": "ws-contract-old", "uid": "u", "labels": applied(_wanted())[2]["metadata"]["labels"]},
    }
    user = make_pod("ws-trainer-1-0", Component.TRAINER)
    user["spec"]["volumes"] = [{"name": "contract", "configMap": {"name": "ws-contract-old"}}]
    assert _steady(old, user).actions == ()
    assert _steady(old).actions == (Delete(kind="ConfigMap", name="ws-contract-old", uid="u"),)


def test_of_old_renders_only_the_newest_are_kept() -> None:
    labels = applied(_wanted())[2]["metadata"]["labels"]
    old = [
        {
            "kind": "ControllerRevision",
            "metadata": {"name": f"ws-old{i}", "uid": f"u{i}", "labels": labels},
            "revision": i,
        }
        for i in range(5)
    ]
    assert [action.name for action in _steady(*old).actions if isinstance(action, Delete)] == [
        "ws-old0",
        "ws-old1",
        "ws-old2",
    ]


def test_a_fleet_at_the_committed_version_is_in_sync() -> None:
    ledger = make_ledger(42, {"ws-inference-0": (42, "CLEAN"), "ws-inference-1": (42, "OPEN")}, last_push=make_push(42))
    step = _steady(ledger=ledger)
    assert _verdict(step, Condition.SYNCED) == ("True", Reason.IN_SYNC)
    assert (step.status.inference.current, step.status.version.committed) == (2, 42)
    assert _verdict(step, Condition.AVAILABLE) == ("True", Reason.ENGINES_READY)
    assert _verdict(step, Condition.PROGRESSING) == ("False", Reason.STABLE)


def test_laggards_are_counted_and_named() -> None:
    step = _steady(ledger=make_ledger(42, {"ws-inference-0": (41, "CLEAN"), "ws-inference-1": (42, "CLEAN")}))
    assert _verdict(step, Condition.SYNCED) == ("False", Reason.BEHIND)
    assert _condition(step, Condition.SYNCED).message == "1 of 2 engines do not hold version 42: ws-inference-0"
    assert step.status.replicas[0].name == "ws-inference-0"


def test_an_engine_whose_heartbeat_ended_is_lost_and_one_without_a_record_is_starting() -> None:
    ledger = make_ledger(3, {"ws-inference-0": (3, "CLEAN")}, live=frozenset())
    states = {view.name: view.state for view in _steady(ledger=ledger).status.replicas}
    assert states == {"ws-inference-0": "LOST", "ws-inference-1": "STARTING"}


@pytest.mark.failure_mode(46)
def test_an_engine_that_has_left_while_its_pod_is_deleted_is_ending_and_not_starting() -> None:
    ledger = make_ledger(3, {"ws-inference-0": (3, "CLEAN")})
    step = _steady(make_pod("ws-inference-1", ready=True, deleting=True), ledger=ledger)
    (left,) = [view for view in step.status.replicas if view.name == "ws-inference-1"]
    assert (left.state, left.reason) == ("ENDING", "has left its session")


def test_records_of_pods_that_are_gone_are_not_shown() -> None:
    ledger = make_ledger(1, {f"ws-inference-{i}": (1, "CLEAN") for i in range(9)})
    assert len(_steady(ledger=ledger).status.replicas) == 2


def test_an_aborted_push_says_who_and_why() -> None:
    push = make_push(5, Decision.ABORT, reason="writer 1 of epoch 1 died")
    ledger = make_ledger(4, {"ws-inference-0": (4, "DIRTY"), "ws-inference-1": (4, "CLEAN")}, last_push=push)
    step = _steady(ledger=ledger)
    assert _verdict(step, Condition.SYNCED) == ("False", Reason.PUSH_ABORTED)
    assert _condition(step, Condition.SYNCED).message == "version 5 (epoch 1) was aborted: writer 1 of epoch 1 died"
    assert _verdict(step, Condition.DEGRADED) == ("True", Reason.ENGINES_DIRTY)
    assert step.status.last_push is not None
    assert step.status.last_push.outcome == "ABORT"


@pytest.mark.failure_mode(61)
def test_a_joiner_after_the_end_of_training_has_no_source() -> None:
    ledger = make_ledger(42, {"ws-inference-0": (42, "CLEAN"), "ws-inference-1": (0, "CLEAN")})
    step = _steady(ledger=ledger, trainer={"state": "Complete"})
    assert _verdict(step, Condition.SYNCED) == ("False", Reason.NO_SOURCE)
    assert _verdict(step, Condition.COMPLETE) == ("True", Reason.TRAINER_SUCCEEDED)


@pytest.mark.failure_mode(61)
@pytest.mark.parametrize(
    ("lender", "live", "reason"),
    [
        ((42, "CLEAN"), True, Reason.BEHIND),
        ((42, "DIRTY"), True, Reason.NO_SOURCE),
        ((41, "CLEAN"), True, Reason.NO_SOURCE),
        ((42, "CLEAN"), False, Reason.NO_SOURCE),
    ],
)
def test_after_training_a_healthy_peer_is_a_source(lender: tuple[int, str], live: bool, reason: Reason) -> None:
    replicas = {"ws-inference-0": lender, "ws-inference-1": (0, "CLEAN")}
    alive = frozenset(replicas) if live else frozenset({"ws-inference-1"})
    ledger = make_ledger(42, replicas, lends=replicas.keys(), live=alive)
    step = _steady(ledger=ledger, trainer={"state": "Complete"})
    assert _verdict(step, Condition.SYNCED) == ("False", reason)
    if reason is Reason.BEHIND:
        assert "peers that have it: ws-inference-0" in _condition(step, Condition.SYNCED).message


def test_the_last_push_says_which_engine_repaired_another() -> None:
    push = make_push(5, source="ws-inference-0", catch_up=True)
    step = _steady(ledger=make_ledger(5, {"ws-inference-0": (5, "CLEAN")}, last_push=push))
    assert step.status.last_push is not None
    assert step.status.last_push.source == "ws-inference-0"


def test_an_unreachable_ledger_is_told_and_its_last_figures_stay() -> None:
    wanted = _wanted()
    status = _running(wanted) | {"version": {"published": 9, "committed": 9}}
    children = [*applied(wanted), _job(wanted), *READY]
    ledger = make_ledger(0, {}, error="ws-redis:6379: no answer in 2 s")
    step = decide(wanted, make_seen(wanted.ctx, *children, status=status, ledger=ledger))
    assert _verdict(step, Condition.LEDGER_REACHABLE) == ("False", Reason.UNREACHABLE)
    assert _verdict(step, Condition.SYNCED) == ("Unknown", Reason.UNREACHABLE)
    assert step.status.version.committed == 9


@pytest.mark.failure_mode(32)
@pytest.mark.parametrize(
    ("transports", "verdict"),
    [
        (["tcp", "self", "cuda_copy"], ("True", Reason.EXPECTED_TRANSPORT)),
        (["tcp", "cma"], ("False", Reason.UNEXPECTED_TRANSPORT)),
        (["self"], ("False", Reason.UNEXPECTED_TRANSPORT)),
        ([], ("Unknown", Reason.NOT_REPORTED)),
    ],
)
def test_the_transports_in_use_are_held_against_the_profile(transports: list[str], verdict: tuple[str, str]) -> None:
    step = _steady(ledger=make_ledger(1, {}, last_push=make_push(1, transports=transports)))
    assert _verdict(step, Condition.TRANSPORT_VERIFIED) == verdict


def test_a_gang_that_does_not_end_is_named() -> None:
    rank = make_pod("ws-trainer-1-0-x", Component.TRAINER)
    step = _steady(rank, trainer={"state": "Stopping", "reason": "epoch 1 failed", "restarts": 1})
    assert _verdict(step, Condition.PROGRESSING) == ("True", Reason.TRAINER_RESTARTING)
    message = _condition(step, Condition.PROGRESSING).message
    assert message == "trainer is Stopping: epoch 1 failed; waits for ws-trainer-1-0-x to end"


@pytest.mark.failure_mode(72)
def test_the_status_does_not_grow_with_the_fleet() -> None:
    wanted = make_wanted(make_context(inference={"replicas": 500}))
    pods = [make_pod(f"ws-inference-{i}", ready=True) for i in range(500)]
    ledger = make_ledger(9, {f"ws-inference-{i}": (9 if i % 7 else 8, "CLEAN") for i in range(500)})
    status = decide(
        wanted, make_seen(wanted.ctx, *applied(wanted), *pods, status=_running(wanted), ledger=ledger)
    ).status
    assert len(status.replicas) == REPLICAS_SHOWN
    assert {view.version for view in status.replicas} == {8}, "laggards first"
    assert status.inference.replicas == 500
    assert len(status.model_dump_json(by_alias=True)) < 16_384


def test_a_name_that_somebody_else_uses_is_told() -> None:
    step = _steady(taken=frozenset({("Secret", "ws-auth")}))
    assert _verdict(step, Condition.DEGRADED) == ("True", Reason.NAME_TAKEN)
    assert "Secret ws-auth" in _condition(step, Condition.DEGRADED).message
    assert step.look_again_s is not None


@pytest.mark.failure_mode(39)
def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    wanted, then = _wanted(), "2020-01-01T00:00:00Z"
    before = [{"type": t.value, "status": "False", "lastTransitionTime": then, "reason": "x"} for t in Condition]
    children = [*applied(wanted), _job(wanted), *READY]
    step = decide(
        wanted, make_seen(wanted.ctx, *children, status=_running(wanted) | {"conditions": before}, generation=7)
    )
    assert _condition(step, Condition.DEGRADED).last_transition_time == then
    assert _condition(step, Condition.SPEC_VALID).last_transition_time != then
    assert {condition.observed_generation for condition in step.status.conditions} == {7}
    assert step.status.observed_generation == 7


def test_conditions_of_others_are_kept() -> None:
    wanted = _wanted()
    other = {"type": "Theirs", "status": "True", "lastTransitionTime": "2020-01-01T00:00:00Z", "reason": "x"}
    step = decide(wanted, make_seen(wanted.ctx, *applied(wanted), status=_running(wanted) | {"conditions": [other]}))
    assert [c.reason for c in step.status.conditions if c.type == "Theirs"] == ["x"]


def test_a_status_that_a_newer_operator_wrote_keeps_its_epoch() -> None:
    wanted = _wanted()
    status = _running(wanted, epoch=7) | {"somethingNew": {"x": 1}}
    assert decide(wanted, make_seen(wanted.ctx, *applied(wanted), status=status)).status.trainer.epoch == 7


def test_an_unreadable_spec_changes_nothing_but_the_condition() -> None:
    wanted = _wanted()
    seen = make_seen(wanted.ctx, status=_running(wanted, epoch=3), generation=4)
    with pytest.raises(pydantic.ValidationError) as refused:
        type(wanted.ctx.spec).model_validate({"trainer": {}})
    status = invalid_spec(seen.resource, refused.value, NOW)
    assert (status.trainer.epoch, status.observed_generation) == (3, 4)
    assert "spec.model" in status.conditions[0].message
    assert "spec.trainer.command" in status.conditions[0].message
