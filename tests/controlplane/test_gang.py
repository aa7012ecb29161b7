"""The trainer's life, one transition a pass: a table of situations, then whole lives played through."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.controlplane.builders import NOW, make_context, make_job, make_ledger, make_pod, make_seen
from weightsync_operator.api.names import LABEL_COMPONENT, Component, TrainerState
from weightsync_operator.api.status import TrainerStatus
from weightsync_operator.plan.actions import Apply, Delete
from weightsync_operator.plan.gang import GangStep, GangWish, step_gang
from weightsync_operator.plan.observed import Seen, disrupted_jobs, timestamp
from weightsync_operator.plan.render import render

TEMPLATE = render(make_context(trainer={"nodes": 2})).trainer
WISH = GangWish(template=TEMPLATE, spec_hash="h", restarts=2, suspend=False, waiting_for="")


def _status(state: TrainerState, epoch: int = 1, **fields: Any) -> TrainerStatus:
    return TrainerStatus(**{"epoch": epoch, "state": state, "spec_hash": "h", **fields})


def _wish(**fields: Any) -> GangWish:
    return dataclasses.replace(WISH, **fields)


def _rank(name: str = "ws-trainer-1-0-abc", **fields: Any) -> dict[str, Any]:
    return make_pod(name, Component.TRAINER, **fields)


def _step(status: TrainerStatus, *children: dict[str, Any], wish: GangWish = WISH, **fields: Any) -> GangStep:
    return step_gang(wish, status, make_seen(None, *children, **fields))


def test_the_epoch_is_noted_before_its_job_is_made() -> None:
    noted = _step(TrainerStatus())
    assert (noted.status.state, noted.status.epoch, noted.actions) == (TrainerState.STARTING, 1, ())
    (create,) = _step(noted.status).actions
    assert isinstance(create, Apply)
    assert create.manifest["metadata"]["name"] == "ws-trainer-1"


def test_nothing_starts_while_something_is_waited_for() -> None:
    step = _step(TrainerStatus(), wish=_wish(waiting_for="ws-redis"))
    assert (step.status.state, step.status.reason, step.actions) == (TrainerState.WAITING, "waits for ws-redis", ())


@pytest.mark.failure_mode(50)
def test_an_epoch_that_only_the_ledger_remembers_is_not_used_again() -> None:
    assert _step(TrainerStatus(), ledger=make_ledger(epoch=7)).status.epoch == 8


@pytest.mark.failure_mode(63)
def test_a_lost_status_does_not_repeat_an_epoch() -> None:
    step = _step(TrainerStatus(), make_job(TEMPLATE, 4), _rank())
    assert (step.status.epoch, [type(action) for action in step.actions]) == (4, [Delete])
    assert _step(step.status).status.epoch == 5


def test_a_job_that_exists_is_running() -> None:
    step = _step(_status(TrainerState.STARTING), make_job(TEMPLATE, 1))
    assert (step.status.state, step.actions) == (TrainerState.RUNNING, ())


@pytest.mark.failure_mode(43)
@pytest.mark.parametrize("condition", ["FailureTarget", "Failed"])
def test_a_failure_is_counted_once_and_noted_before_anything_is_deleted(condition: str) -> None:
    job, ranks = make_job(TEMPLATE, 1, condition=condition), [_rank(exit_code=9, phase="Failed")]
    noted = _step(_status(TrainerState.RUNNING), job, *ranks)
    assert (noted.status.state, noted.status.restarts, noted.actions) == (TrainerState.STOPPING, 1, ())
    assert "ws-trainer-1-0-abc exited with 9" in noted.status.reason
    again = _step(noted.status, job, *ranks)
    assert again.status.restarts == 1
    assert again.actions == (Delete(kind="Job", name="ws-trainer-1", uid="job-1", foreground=True),)


@pytest.mark.failure_mode(62)
def test_the_next_epoch_waits_until_every_pod_of_the_last_is_gone() -> None:
    stopping = _status(TrainerState.STOPPING, restarts=1)
    assert _step(stopping, make_job(TEMPLATE, 1, deleting=True), _rank()).status.epoch == 1
    waiting = _step(stopping, _rank(deleting=True))
    assert (waiting.status.epoch, waiting.actions) == (1, ())
    assert _step(stopping).status.epoch == 2


@pytest.mark.failure_mode(62)
def test_a_noted_epoch_is_not_created_beside_pods_of_another() -> None:
    assert _step(_status(TrainerState.STARTING, epoch=2), _rank()).actions == ()


@pytest.mark.failure_mode(43)
def test_failures_wait_longer_each_time_up_to_a_minute() -> None:
    def delay_s(restarts: int) -> float:
        status = _status(TrainerState.STOPPING, restarts=restarts, failed_at=timestamp(NOW))
        return _step(status, wish=_wish(restarts=1000)).look_again_s or 0.0

    assert [delay_s(n) for n in (1, 2, 3, 4, 5, 6, 500)] == [0, 5, 10, 20, 40, 60, 60]


@pytest.mark.failure_mode(43)
def test_a_spent_budget_is_final_until_it_is_raised_or_the_spec_changes() -> None:
    failed = _step(_status(TrainerState.RUNNING, restarts=2), make_job(TEMPLATE, 1, condition="Failed")).status
    assert (failed.state, failed.restarts) == (TrainerState.FAILED, 3)
    assert _step(failed).status == failed
    raised = _step(failed, wish=_wish(restarts=3), now=NOW + 60).status
    assert (raised.state, raised.restarts) == (TrainerState.STARTING, 3)
    changed = _step(failed, wish=_wish(spec_hash="other")).status
    assert (changed.state, changed.restarts) == (TrainerState.STARTING, 0)


def test_a_disruption_is_read_from_the_pods_themselves() -> None:
    """Of a trainer's Job alone, and only while the condition is True: what no event told, a list tells."""
    cases = {
        ("trainer", "True"): {"job-1"},
        ("trainer", "False"): set(),
        ("inference", "True"): set(),
    }
    for (component, status), expected in cases.items():
        pod = {
            "metadata": {"labels": {LABEL_COMPONENT: component}, "ownerReferences": [{"kind": "Job", "uid": "job-1"}]},
            "status": {"conditions": [{"type": "DisruptionTarget", "status": status}]},
        }
        assert disrupted_jobs({("Pod", "p"): pod, ("Job", "j"): pod}) == expected


def test_a_disruption_spends_nothing() -> None:
    job = make_job(TEMPLATE, 1, condition="Failed")
    step = _step(_status(TrainerState.RUNNING), job, disrupted=frozenset({"job-1"}))
    assert (step.status.state, step.status.restarts) == (TrainerState.STOPPING, 0)


@pytest.mark.failure_mode(63)
def test_success_is_final_even_without_its_job() -> None:
    complete = _step(_status(TrainerState.RUNNING), make_job(TEMPLATE, 1, condition="Complete")).status
    assert complete.state is TrainerState.COMPLETE
    assert _step(complete) == GangStep(status=complete)
    assert _step(complete, wish=_wish(suspend=True)).status.state is TrainerState.COMPLETE


@pytest.mark.failure_mode(63)
def test_a_changed_trainer_trains_again() -> None:
    complete = _status(TrainerState.COMPLETE)
    stopping = _step(complete, make_job(TEMPLATE, 1, condition="Complete"), wish=_wish(spec_hash="other"))
    assert [type(action) for action in stopping.actions] == [Delete]
    assert _step(stopping.status, wish=_wish(spec_hash="other")).status.epoch == 2


def test_a_changed_template_replaces_the_running_gang_without_spending() -> None:
    other = render(make_context(trainer={"nodes": 2, "image": "x"})).trainer
    step = _step(_status(TrainerState.RUNNING), make_job(other, 1), _rank())
    assert (step.status.state, step.status.restarts, step.status.reason) == (
        TrainerState.STOPPING,
        0,
        "the spec changed",
    )


def test_a_job_that_somebody_deleted_is_followed_by_a_new_epoch() -> None:
    gone = _step(_status(TrainerState.RUNNING))
    assert gone.status.state is TrainerState.STOPPING
    assert _step(gone.status).status.epoch == 2


@pytest.mark.failure_mode(42)
def test_suspend_takes_the_gang_away_and_resume_is_a_new_epoch() -> None:
    wish = _wish(suspend=True)
    stopping = _step(_status(TrainerState.RUNNING), make_job(TEMPLATE, 1), _rank(), wish=wish)
    assert stopping.status.state is TrainerState.STOPPING
    assert [type(action) for action in stopping.actions] == [Delete]
    assert _step(stopping.status, _rank(deleting=True), wish=wish).status.state is TrainerState.STOPPING
    suspended = _step(stopping.status, wish=wish).status
    assert suspended.state is TrainerState.SUSPENDED
    assert _step(suspended, wish=wish).status == suspended
    resumed = _step(suspended).status
    assert (resumed.state, resumed.epoch) == (TrainerState.STARTING, 2)


def test_a_gang_that_is_suspended_before_its_job_exists_never_makes_it() -> None:
    step = _step(_status(TrainerState.STARTING), wish=_wish(suspend=True))
    assert (step.status.state, step.actions) == (TrainerState.SUSPENDED, ())


class _World:
    """A cluster with one gang in it, just real enough to play lives through."""

    def __init__(self) -> None:
        self.jobs: dict[int, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.status = TrainerStatus()
        self.epochs_made: list[int] = []

    def play(self, wish: GangWish = WISH, passes: int = 20, now: float = NOW) -> None:
        for _ in range(passes):
            seen: Seen = make_seen(None, *self.jobs.values(), *self.pods, now=now)
            step = step_gang(wish, self.status, seen)
            self.status = step.status
            for action in step.actions:
                self._act(action)
            now += 61

    def _act(self, action: object) -> None:
        if isinstance(action, Apply):
            epoch = self.status.epoch
            assert not self.pods, "two gangs at once"
            self.epochs_made.append(epoch)
            self.jobs[epoch] = make_job(TEMPLATE, epoch)
            self.pods = [_rank(f"ws-trainer-{epoch}-{i}") for i in range(2)]
        if isinstance(action, Delete):
            self.jobs, self.pods = {}, []

    def end(self, condition: str) -> None:
        self.jobs = {epoch: make_job(TEMPLATE, epoch, condition=condition) for epoch in self.jobs}


@pytest.mark.failure_mode(43)
def test_a_gang_that_always_fails_ends_after_its_budget() -> None:
    world = _World()
    for _ in range(10):
        world.play()
        world.end("Failed")
    assert world.epochs_made == [1, 2, 3], "one run and two restarts"
    assert world.status.state is TrainerState.FAILED


def test_a_gang_that_recovers_completes_and_stays_so() -> None:
    world = _World()
    world.play()
    world.end("Failed")
    world.play()
    world.end("Complete")
    world.play()
    world.jobs, world.pods = {}, []
    world.play()
    assert (world.epochs_made, world.status.state) == ([1, 2], TrainerState.COMPLETE)
