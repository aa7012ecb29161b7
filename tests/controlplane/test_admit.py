"""A spec comes into force after the API server and the preflight pod agreed; until then nothing else is made."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.controlplane.builders import make_context, make_pod, make_seen
from weightsync_operator.api.names import Component, Reason
from weightsync_operator.api.status import PreflightError, PreflightStatus
from weightsync_operator.plan.actions import Apply, Delete, DryRun
from weightsync_operator.plan.admit import Admission, step_admission
from weightsync_operator.plan.observed import DryRunVerdict
from weightsync_operator.plan.render import preflight_pod, render

CTX = make_context()
RENDERED = render(CTX)
POD = preflight_pod(CTX, RENDERED)
NAME = POD["metadata"]["name"]
KEY = NAME.rsplit("-", 1)[-1]
PASSED = DryRunVerdict(revision="r")


def _step(*children: dict[str, Any], known: PreflightStatus | None = None, **fields: Any) -> Admission:
    return step_admission("r", RENDERED, POD, known, make_seen(CTX, *children, **{"dry_run": PASSED, **fields}))


def _preflight(**fields: Any) -> dict[str, Any]:
    return make_pod(NAME, Component.PREFLIGHT, **fields)


def test_the_api_server_is_asked_first_and_nothing_is_made() -> None:
    (action,) = _step(dry_run=None).actions
    assert isinstance(action, DryRun)
    assert {"StatefulSet", "Job", "Deployment", "Pod"} <= {manifest["kind"] for manifest in action.manifests}


def test_a_verdict_about_another_spec_does_not_count() -> None:
    (action,) = _step(dry_run=DryRunVerdict(revision="older")).actions
    assert isinstance(action, DryRun)


@pytest.mark.failure_mode(65)
def test_a_refused_child_is_told_with_its_field_and_not_tried_again() -> None:
    step = _step(
        dry_run=DryRunVerdict(
            revision="r", field="spec.trainer.podTemplate.spec.x", message="field not declared in schema"
        )
    )
    assert (step.admitted, step.settled, step.reason, step.actions, step.look_again_s) == (
        False,
        True,
        Reason.SPEC_INVALID,
        (),
        None,
    )
    assert step.message == "spec.trainer.podTemplate.spec.x: field not declared in schema"


def test_then_the_preflight_pod_is_made() -> None:
    (action,) = _step().actions
    assert isinstance(action, Apply)
    assert action.manifest["metadata"]["name"] == NAME


def test_a_good_verdict_admits() -> None:
    answered = _step(_preflight(phase="Succeeded", exit_code=0, message=json.dumps({"ok": True, "errors": []})))
    assert answered.preflight == PreflightStatus(hash=KEY, ok=True)
    assert _step(known=answered.preflight).admitted


def test_a_bad_verdict_refuses_with_every_field() -> None:
    errors = [{"field": "spec.inference.parallelism.tp", "message": "9 heads are not divisible by tp 2"}]
    answered = _step(_preflight(phase="Failed", exit_code=1, message=json.dumps({"ok": False, "errors": errors})))
    step = _step(known=answered.preflight)
    assert (step.admitted, step.settled, step.reason) == (False, True, Reason.PREFLIGHT_FAILED)
    assert step.message == "spec.inference.parallelism.tp: 9 heads are not divisible by tp 2"


def test_a_verdict_about_another_model_is_asked_again() -> None:
    step = _step(known=PreflightStatus(hash="other", ok=True))
    assert not step.admitted
    assert [type(action) for action in step.actions] == [Apply]


@pytest.mark.parametrize(
    "message", ["", "Traceback: boom", '{"ok": true}', "[]", '{"ok": true, "errors": [{"field": 1}]}']
)
def test_a_pod_without_a_verdict_is_asked_again_and_says_why(message: str) -> None:
    step = _step(_preflight(phase="Failed", exit_code=137, message=message))
    assert not step.settled
    assert "ended with 137" in step.message
    assert step.actions == (Delete(kind="Pod", name=NAME, uid=f"uid-{NAME}"),)


def test_a_missing_folder_is_told_by_its_field() -> None:
    fault = 'MountVolume.SetUp failed for volume "model": hostPath type check failed: /models/tiny is not a directory'
    step = _step(_preflight(phase="Pending"), mount_faults=(fault,))
    assert (step.settled, step.reason) == (True, Reason.MODEL_MISSING)
    assert step.message == f"spec.model.hostPath: {fault}"
    assert step.look_again_s is not None, "the folder may appear"


def test_a_missing_image_is_told_by_its_field() -> None:
    pod = _preflight(phase="Pending")
    pod["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
    step = _step(pod)
    assert (step.settled, step.reason, step.message) == (
        True,
        Reason.IMAGE_MISSING,
        "spec.inference.image: no such image",
    )


@pytest.mark.parametrize(
    ("words", "settled", "message"),
    [
        ('persistentvolumeclaim "m" not found', True, 'spec.model.hostPath: persistentvolumeclaim "m" not found'),
        ("0/1 nodes: Insufficient cpu", False, "the preflight pod is not scheduled: 0/1 nodes: Insufficient cpu"),
    ],
)
def test_a_pod_that_cannot_be_scheduled_says_so(words: str, settled: bool, message: str) -> None:
    pod = _preflight(phase="Pending")
    pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "message": words}]
    step = _step(pod)
    assert (step.settled, step.message) == (settled, message)
    assert step.look_again_s is not None, "what is missing may come"


def test_many_errors_are_cut_with_their_number() -> None:
    errors = tuple(PreflightError(field=f"f{i}", message="x") for i in range(9))
    assert _step(known=PreflightStatus(hash=KEY, ok=False, errors=errors)).message.endswith("; and 4 more")
