"""The last resort: when a checkpoint is pushed, when it is not, what the pod is, and what the status says meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.controlplane.builders import (
    NOW,
    applied,
    make_context,
    make_ledger,
    make_pod,
    make_push,
    make_seen,
    make_wanted,
)
from weightsync_operator.api.names import (
    ANNOTATION_TEMPLATE,
    LABEL_LOST_VERSION,
    Component,
    Condition,
    Reason,
    TrainerState,
)
from weightsync_operator.api.status import ConditionStatus, TrainerStatus, VersionStatus, WeightSyncStatus
from weightsync_operator.plan.actions import Apply, Delete, DryRun
from weightsync_operator.plan.admit import step_admission
from weightsync_operator.plan.build.restore import job_for_version, restore_hash
from weightsync_operator.plan.decide import Step, Wanted, decide
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.gang import GangWish, step_gang
from weightsync_operator.plan.observed import timestamp
from weightsync_operator.plan.render import Render, preflight_pod, render, revision_of

CHECKPOINT = {"persistentVolumeClaim": {"claimName": "checkpoints", "subPath": "run-1"}}
ENGINES = ("ws-inference-0", "ws-inference-1")
NOBODY_HAS_IT: dict[str, tuple[int, str]] = {ENGINES[0]: (0, "CLEAN"), ENGINES[1]: (0, "CLEAN")}


def _wanted(checkpoint: Mapping[str, Any] = CHECKPOINT) -> Wanted:
    return make_wanted(make_context(inference={"replicas": 2}, transfer={"checkpoint": checkpoint}))


def _render(**over: Any) -> Render:
    return render(make_context(transfer={"checkpoint": CHECKPOINT}, **over))


def _template(wanted: Wanted) -> dict[str, Any]:
    assert wanted.in_force is not None
    assert wanted.in_force.restore is not None
    return wanted.in_force.restore


def _job(wanted: Wanted, version: int = 42, *, condition: str | None = None, template: str = "") -> dict[str, Any]:
    """The attempt as the API server shows it."""
    job = job_for_version(_template(wanted), version)
    job["metadata"]["uid"] = f"uid-{job['metadata']['name']}"
    if template:
        job["metadata"]["annotations"][ANNOTATION_TEMPLATE] = template
    conditions = [] if condition is None else [{"type": condition, "status": "True"}]
    return {**job, "status": {"conditions": conditions}}


def _pass(
    *extra: dict[str, Any],
    wanted: Wanted | None = None,
    replicas: Mapping[str, tuple[int, str]] | None = None,
    trainer: str = "Complete",
    suspend: bool = False,
    version: int = 42,
    stood: int = 0,
    session: str | None = None,
    unread: bool = False,
    **ledger: Any,
) -> Step:
    """A pass after training: `version` is committed, and these replicas hold what they hold.

    stood: the version that the status had, of `session`; unread: the ledger was not asked yet.
    """
    wanted = wanted or _wanted()
    if suspend:
        spec = wanted.ctx.spec.model_copy(update={"suspend": True})
        wanted = make_wanted(type(wanted.ctx)(**{**vars(wanted.ctx), "spec": spec}))
    assert wanted.in_force is not None
    spent = {"restarts": 11 if trainer == "Failed" else 0}
    gang = TrainerStatus.model_validate(
        {"epoch": 1, "state": trainer, "specHash": wanted.in_force.trainer_hash, **spent}
    )
    shown_version = VersionStatus(committed=stood, session=wanted.in_force.session if session is None else session)
    status = WeightSyncStatus(revision=wanted.in_force_revision, trainer=gang, version=shown_version)
    children = [*applied(wanted), *(make_pod(name) for name in ENGINES), *extra]
    by_key = {(child["kind"], child["metadata"]["name"]): child for child in children}
    view = None if unread else make_ledger(version, NOBODY_HAS_IT if replicas is None else replicas, **ledger)
    shown = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return decide(wanted, make_seen(wanted.ctx, *by_key.values(), status=shown, ledger=view))


def _made(step: Step) -> list[str]:
    """Names of the Jobs that a pass makes."""
    applied_ = [action.manifest for action in step.actions if isinstance(action, Apply)]
    return [manifest["metadata"]["name"] for manifest in applied_ if manifest["kind"] == "Job"]


def _deleted(step: Step) -> list[str]:
    return [action.name for action in step.actions if isinstance(action, Delete) and action.kind == "Job"]


def _synced(step: Step) -> ConditionStatus:
    return next(condition for condition in step.status.conditions if condition.type == Condition.SYNCED)


@pytest.mark.failure_mode(61)
@pytest.mark.parametrize("trainer", ["Complete", "Failed"])
@pytest.mark.parametrize("states", [("CLEAN", "CLEAN"), ("DIRTY", "CLEAN"), ("DIRTY", "DIRTY")])
def test_a_version_that_nobody_holds_any_more_is_replaced_by_the_checkpoint(
    trainer: str, states: tuple[str, str]
) -> None:
    wanted = _wanted()
    step = _pass(replicas={n: (0, s) for n, s in zip(ENGINES, states, strict=True)}, trainer=trainer)
    (name,) = _made(step)
    assert name == job_for_version(_template(wanted), 42)["metadata"]["name"]
    assert (_synced(step).status, _synced(step).reason) == ("False", Reason.RESTORING)
    assert f"Job {name} is made" in _synced(step).message


def test_an_attempt_that_runs_is_left_alone_and_told() -> None:
    pod = make_pod("ws-restore-x", Component.RESTORE, phase="Pending")
    pod["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "message": 'claim "checkpoints" is lost'}
    ]
    step = _pass(_job(_wanted()), pod)
    assert (_made(step), _deleted(step), _synced(step).reason) == ([], [], Reason.RESTORING)
    assert 'ws-restore-x is Pending: claim "checkpoints" is lost' in _synced(step).message


def test_an_attempt_that_failed_is_not_repeated_and_says_why() -> None:
    failed = _job(_wanted(), condition="Failed")
    pods = [
        make_pod(
            "ws-restore-b", Component.RESTORE, phase="Failed", exit_code=2, message="...\nno complete checkpoint\n"
        ),
        make_pod("ws-restore-a", Component.RESTORE, phase="Failed", exit_code=1, message="earlier"),
    ]
    for index, pod in enumerate(reversed(pods)):
        pod["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = f"2027-01-15T08:0{index}:00Z"
    step = _pass(failed, *pods)
    assert (_made(step), _deleted(step), _synced(step).reason) == ([], [], Reason.NO_SOURCE)
    assert "failed: no complete checkpoint; mend spec.transfer.checkpoint" in _synced(step).message


@pytest.mark.parametrize("over", [{"unread": True}, {"error": "no answer in 2 s"}])
def test_an_attempt_that_failed_stays_while_the_ledger_is_silent(over: dict[str, Any]) -> None:
    """Else each restart of the operator, and each outage of Redis, would try it again."""
    assert _deleted(_pass(_job(_wanted(), condition="Failed"), **over)) == []


@pytest.mark.parametrize("message", ["", " \n ", None])
def test_an_attempt_that_left_no_word_is_told_by_its_exit_code(message: str) -> None:
    pod = make_pod("ws-restore-a", Component.RESTORE, phase="Failed", exit_code=137, message=message)
    step = _pass(_job(_wanted(), condition="Failed"), pod)
    assert "failed: exit code 137; mend" in _synced(step).message
    degraded = next(c for c in step.status.conditions if c.type == Condition.DEGRADED)
    assert (degraded.status, degraded.reason) == ("True", Reason.RESTORE_FAILED)


def test_an_attempt_is_withdrawn_when_an_engine_that_has_the_version_comes_back() -> None:
    """One that has made a version is left to end."""
    back = {ENGINES[0]: (42, "CLEAN"), ENGINES[1]: (0, "CLEAN")}
    job, earlier = _job(_wanted()), _job(_wanted(), 41)
    assert _deleted(_pass(job, earlier, replicas=back)) == [job["metadata"]["name"]]


@pytest.mark.parametrize("state", ["OPEN", "VERIFIED", "DIRTY"])
def test_an_attempt_that_has_engines_open_goes_on(state: str) -> None:
    """Engines that its push has opened are about to resume. Seen to fail where that made it no loss, and its Job was deleted."""
    step = _pass(_job(_wanted()), replicas={ENGINES[0]: (0, state), ENGINES[1]: (0, "CLEAN")})
    assert (_deleted(step), _made(step), _synced(step).reason) == ([], [], Reason.RESTORING)


def test_an_attempt_that_found_the_version_is_made_again_when_it_is_lost_after_all() -> None:
    ended = _job(_wanted(), condition="Complete")
    step = _pass(ended)
    assert (_deleted(step), _made(step)) == ([ended["metadata"]["name"]], [])


def test_a_failed_attempt_stays_while_somebody_pushes_by_hand() -> None:
    step = _pass(_job(_wanted(), condition="Failed"), replicas={ENGINES[0]: (0, "OPEN"), ENGINES[1]: (0, "CLEAN")})
    assert _deleted(step) == []


def test_another_checkpoint_is_another_attempt_and_takes_the_failed_one_away() -> None:
    failed = _job(_wanted(), condition="Failed")
    mended = _wanted({"hostPath": "/mended"})
    step = _pass(failed, wanted=mended)
    assert (_made(step), _deleted(step)) == ([], [failed["metadata"]["name"]])
    assert _made(_pass(wanted=mended)) != _made(_pass())


def test_an_attempt_of_an_older_spec_is_stopped_and_one_that_has_just_succeeded_may_end() -> None:
    older, ours = _job(_wanted(), 41, template="older"), _job(_wanted(), 41)
    assert (_made(_pass(older)), _deleted(_pass(older))) == ([], [older["metadata"]["name"]])
    assert (_made(_pass(ours)), _deleted(_pass(ours))) == ([], [])
    ended = _job(_wanted(), 41, condition="Complete")
    assert _deleted(_pass(ended)) == [ended["metadata"]["name"]]


def _engine(
    name: str, started_s_ago: float | None = None, *, ready: bool = False, deleting: bool = False
) -> dict[str, Any]:
    """An engine's pod whose process started so long before NOW, or has none."""
    pod = make_pod(name, ready=ready, deleting=deleting)
    running = {} if started_s_ago is None else {"running": {"startedAt": timestamp(NOW - started_s_ago)}}
    pod["status"]["containerStatuses"] = [{"name": "sidecar", "state": {}}, {"name": "engine", "state": running}]
    return pod


HELD: dict[str, dict[str, Any]] = {
    "an engine serves it and lends": {"replicas": {ENGINES[0]: (42, "CLEAN")}, "lends": ENGINES},
    "an engine serves it and cannot lend": {"replicas": {ENGINES[0]: (42, "CLEAN")}},
    "a push is open on an engine that has it": {"replicas": {ENGINES[0]: (42, "OPEN")}},
    "an engine is about to resume with it": {"replicas": {ENGINES[0]: (41, "VERIFIED"), ENGINES[1]: (41, "VERIFIED")}},
    "an engine serves what may still be served": {
        "replicas": {ENGINES[0]: (41, "CLEAN"), ENGINES[1]: (0, "CLEAN")},
        "pods": [_engine(ENGINES[0], 6000, ready=True)],
    },
    "the trainer runs": {"trainer": "Running"},
    "the trainer is about to run": {"trainer": "Stopping"},
    "the ledger is silent": {"error": "no answer in 2 s"},
    "nothing is named": {"wanted": make_wanted(make_context(inference={"replicas": 2}))},
    "it is suspended": {"suspend": True},
    "nothing was ever committed": {"version": 0, "replicas": {ENGINES[0]: (0, "DIRTY")}},
    "the ledger was not read": {"unread": True},
}


@pytest.mark.parametrize("case", HELD)
def test_no_checkpoint_is_pushed_while(case: str) -> None:
    fields = dict(HELD[case])
    assert _made(_pass(*fields.pop("pods", ()), **fields)) == []


@pytest.mark.parametrize(
    ("pod", "words"),
    [
        (_engine(ENGINES[0], 6000), "whose heartbeat ended"),
        (_engine(ENGINES[0], 60), "waits for ws-inference-0 to join"),
        (_engine(ENGINES[0], 1000), ""),
        (_engine(ENGINES[0]), ""),
        (_engine(ENGINES[0], 6000, deleting=True), ""),
    ],
    ids=["it has run since the push", "it starts", "it started and never joined", "it is down", "it is leaving"],
)
def test_a_silent_engine_is_waited_for_while_it_may_hold_the_version_or_is_about_to_join(
    pod: dict[str, Any], words: str
) -> None:
    """The last push ended 3000 s ago. Else a checkpoint replaces what it holds; or a pod that never starts holds up the others."""
    step = _pass(pod, replicas={ENGINES[1]: (0, "CLEAN")}, last_push=make_push(42, finished_at=NOW - 3000))
    assert (_made(step) == []) is bool(words)
    assert words in _synced(step).message
    assert (step.look_again_s is not None) is bool(words)


def test_right_after_a_push_engines_are_given_the_time_to_say_that_they_hold_it() -> None:
    """The trainer exits after its last push, and the view of the ledger is from before the engines resumed."""
    just, long_ago = (_pass(last_push=make_push(42, finished_at=NOW - s)) for s in (10, 100))
    assert (_made(just), len(_made(long_ago))) == ([], 1)
    assert "the last push has only just ended" in _synced(just).message


def test_a_push_of_the_checkpoint_waits_for_the_engines_that_it_needs() -> None:
    assert "0 of the 1 that a push needs are there" in _synced(_pass(live=frozenset())).message
    quorum = make_wanted(make_context(inference={"replicas": 2}, transfer={"checkpoint": CHECKPOINT, "quorum": 2}))
    one = _pass(wanted=quorum, live=frozenset({ENGINES[1]}))
    assert (_made(one), _synced(one).reason) == ([], Reason.RESTORING)
    assert len(_made(_pass(wanted=quorum))) == 1


@pytest.mark.failure_mode(70)
def test_a_ledger_that_lost_its_data_turns_no_version_back_and_its_engines_are_restored() -> None:
    """Redis was moved while the resource was suspended: engines serve the model as loaded, and believe that it is the newest."""
    ready = [_engine(name, 60, ready=True) for name in ENGINES]
    step = _pass(*ready, version=0, stood=42)
    assert (step.status.version.committed, len(_made(step))) == (42, 1)
    other = _pass(*ready, version=0, stood=42, session="another")
    assert (other.status.version.committed, _made(other)) == (0, [])
    assert _synced(other).status == "True"


def test_it_waits_for_ranks_that_still_run_but_not_for_those_that_have_ended() -> None:
    running, ended = (make_pod("ws-trainer-1-0-x", Component.TRAINER, phase=p) for p in ("Running", "Succeeded"))
    assert "waits for ws-trainer-1-0-x to end" in _synced(_pass(running)).message
    assert _made(_pass(running)) == []
    assert len(_made(_pass(ended))) == 1


@pytest.mark.parametrize("over", [{"trainer": "Stopping"}, {"suspend": True}])
def test_whoever_takes_over_ends_the_attempt(over: dict[str, Any]) -> None:
    job = _job(_wanted())
    assert _deleted(_pass(job, **over)) == [job["metadata"]["name"]]


@pytest.mark.failure_mode(50)
def test_the_next_trainer_waits_until_nobody_pushes_a_checkpoint() -> None:
    """Seen to fail with `_restoring` left out: both would ask for the same epoch."""
    template = _render().trainer
    wish = GangWish(template=template, spec_hash="new", restarts=1, suspend=False, waiting_for="")
    before = TrainerStatus.model_validate({"epoch": 1, "state": "Complete", "specHash": "old"})
    pushing, ended = (make_pod("ws-restore-x", Component.RESTORE, phase=p) for p in ("Running", "Succeeded"))
    assert step_gang(wish, before, make_seen(None, pushing)).status.state is TrainerState.STOPPING
    assert step_gang(wish, before, make_seen(None, ended)).status.epoch == 2


@pytest.mark.failure_mode(50)
def test_the_next_trainer_takes_no_epoch_that_a_push_of_a_checkpoint_took() -> None:
    """1. the view of the ledger is from before the push opened epoch 2; 2. after a restart of the operator there is no view."""
    wish = GangWish(
        template=_render().trainer, spec_hash="new", restarts=1, suspend=False, waiting_for="", restores=True
    )
    before = TrainerStatus.model_validate({"epoch": 1, "state": "Complete", "specHash": "old"})
    ledger = make_ledger(42, epoch=1)
    waits = step_gang(wish, before, make_seen(None, make_pod("ws-restore-x", Component.RESTORE), ledger=ledger))
    again = step_gang(wish, waits.status, make_seen(None, ledger=ledger))
    assert again.status.epoch == 3
    unread = step_gang(wish, before, make_seen(None))
    assert (unread.status.state, unread.look_again_s is not None) == (TrainerState.STOPPING, True)
    assert step_gang(wish, before, make_seen(None, ledger=make_ledger(44, epoch=5))).status.epoch == 6


def test_a_suspended_resource_still_ends_while_a_checkpoint_is_pushed() -> None:
    step = _pass(make_pod("ws-restore-x", Component.RESTORE), suspend=True)
    suspended = next(c for c in step.status.conditions if c.type == Condition.SUSPENDED)
    assert (suspended.status, suspended.reason) == ("False", Reason.SUSPENDING)
    assert "ws-restore-x" in suspended.message


def test_the_pod_reads_the_checkpoint_and_takes_no_gpu() -> None:
    job = job_for_version(_template(_wanted()), 42)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    lost = ["--if-lost", "$(WEIGHTSYNC_LOST_VERSION)"]
    assert container["command"][-6:] == ["weightsync", "push", "--newest", *lost, "/checkpoint"]
    assert {"name": "WEIGHTSYNC_LOST_VERSION", "value": "42"} in container["env"]
    mount = next(m for m in container["volumeMounts"] if m["name"] == "checkpoint")
    assert mount == {"name": "checkpoint", "mountPath": "/checkpoint", "readOnly": True, "subPath": "run-1"}
    volume = next(v for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == "checkpoint")
    assert volume["persistentVolumeClaim"] == {"claimName": "checkpoints", "readOnly": True}
    assert "nvidia.com/gpu" not in str(container["resources"])
    assert job["metadata"]["labels"][LABEL_LOST_VERSION] == "42"
    assert len(job["metadata"]["name"]) <= len("ws") + 23, "names of 40 characters leave a Job 63"


@pytest.mark.parametrize(
    ("where", "folder"), [({"path": "/data/out"}, "/data/out"), ({"hostPath": "/srv/o"}, "/checkpoint")]
)
def test_the_checkpoint_may_lie_elsewhere(where: dict[str, str], folder: str) -> None:
    made = render(make_context(transfer={"checkpoint": where})).restore
    assert made is not None
    spec = made["spec"]["template"]["spec"]
    assert spec["containers"][0]["command"][-1] == folder
    hosts = [volume["hostPath"]["path"] for volume in spec["volumes"] if volume["name"] == "checkpoint"]
    assert hosts == list(where.values())[: len(hosts)]
    assert len(hosts) == ("hostPath" in where)


def test_a_pod_template_is_laid_over_it_and_a_wrong_one_is_refused_by_its_path() -> None:
    memory = {"spec": {"containers": [{"name": "restore", "resources": {"requests": {"memory": "64Gi"}}}]}}
    made = render(make_context(transfer={"checkpoint": {**CHECKPOINT, "podTemplate": memory}})).restore
    assert made is not None
    assert made["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["memory"] == "64Gi"
    with pytest.raises(SpecError, match=r"spec\.transfer\.checkpoint\.podTemplate\.spec"):
        render(
            make_context(transfer={"checkpoint": {**CHECKPOINT, "podTemplate": {"spec": {"restartPolicy": "Always"}}}})
        )


def test_dra_fabrics_claim_its_devices_without_a_gpu() -> None:
    made = _render(fabric={"profile": "dra"})
    claims = [c for c in made.base if c["metadata"]["labels"]["app.kubernetes.io/component"] == Component.RESTORE]
    (template,) = [claim for claim in claims if claim["kind"] == "ResourceClaimTemplate"]
    requests = template["spec"]["spec"]["devices"]["requests"]
    assert [request["name"] for request in requests] == ["nic-0"]


def test_naming_a_checkpoint_restarts_nothing() -> None:
    with_it, without_it = _render(), render(make_context())
    assert (with_it.session, with_it.trainer_hash) == (without_it.session, without_it.trainer_hash)
    assert (with_it.engines, with_it.trainer) == (without_it.engines, without_it.trainer)
    assert "restore" not in without_it.to_data(), "a render that names none is what it was"
    assert Render.from_data(without_it.to_data()) == without_it
    assert Render.from_data(with_it.to_data()) == with_it
    assert revision_of(make_context(transfer={"timeoutSeconds": 120}).spec, "a") == revision_of(
        make_context().spec, "a"
    )


def test_the_api_server_judges_the_job_before_the_spec_comes_into_force() -> None:
    ctx = make_context(transfer={"checkpoint": CHECKPOINT})
    rendered = render(ctx)
    admission = step_admission("r", rendered, preflight_pod(ctx, rendered), None, make_seen(ctx))
    (dry_run,) = admission.actions
    assert isinstance(dry_run, DryRun)
    assert any(m["metadata"]["name"].startswith("ws-restore-") for m in dry_run.manifests)


def test_templates_differ_when_what_is_pushed_would() -> None:
    hashes = {restore_hash(_template(_wanted({"hostPath": f"/srv/{i}"}))) for i in range(3)}
    assert len(hashes) == 3
