"""The parts of the demo that read the cluster and make objects for it."""

import io
import json
from typing import Any

import pytest
import yaml
from rich.console import Console

from e2e.demo import training
from e2e.demo.client import pod as client_pod
from e2e.demo.cluster import EXAMPLE, all_ready
from e2e.demo.fresh import FRESH_POD, fresh_pod
from e2e.demo.seen import describe, pod_line
from e2e.demo.timeline import Timeline
from e2e.lab.errors import LabError

PUSH = {
    "version": 4,
    "epoch": 1,
    "step": 3,
    "seconds": 0.9,
    "pause_seconds": 0.71,
    "gbps": 1.25,
    "digest": "0123456789abcdef99",
}
LINE = {
    "step": 3,
    "sampled_version": 3,
    "reward_mean": 0.25,
    "reward_std": 0.1,
    "samples": 16,
    "checkpoint": None,
    "push": PUSH,
}


def make_pod(name: str, *, ready: bool = False, phase: str = "Running", **status: Any) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": str(ready)}, *status.pop("conditions", [])]
    return {"metadata": {"name": name}, "status": {"phase": phase, "conditions": conditions, **status}}


def waiting(reason: str, message: str = "") -> list[dict[str, Any]]:
    return [{"restartCount": 2, "state": {"waiting": {"reason": reason, "message": message}}}]


class TestWhatIsWaitedFor:
    def test_a_pod_that_cannot_start_says_why(self):
        assert (
            pod_line(make_pod("e-0", containerStatuses=waiting("CrashLoopBackOff")))
            == "e-0 CrashLoopBackOff (restarts 2)"
        )
        unschedulable = [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/1 nodes have nvidia.com/gpu",
            }
        ]
        assert "0/1 nodes have nvidia.com/gpu" in pod_line(make_pod("e-0", phase="Pending", conditions=unschedulable))

    def test_an_ordinary_start_is_not_called_a_fault(self):
        assert (
            pod_line(make_pod("e-0", phase="Pending", containerStatuses=waiting("ContainerCreating"))) == "e-0 pending"
        )
        assert pod_line(make_pod("e-0")) == "e-0 not ready"
        assert pod_line(make_pod("e-0", ready=True)) == "e-0 ready"

    def test_a_bad_spec_is_told_before_any_pod(self):
        refused = {
            "type": "SpecValid",
            "status": "False",
            "reason": "ModelMissing",
            "message": "spec.model.hostPath: no such folder",
        }
        told = describe({"status": {"conditions": [refused]}}, [make_pod("e-0")])
        assert told == "spec: ModelMissing spec.model.hostPath: no such folder"

    def test_faults_come_first(self):
        valid = {"type": "SpecValid", "status": "True", "reason": "Valid"}
        degraded = {"type": "Degraded", "status": "True", "reason": "EnginesDirty", "message": "e-0 is torn"}
        told = describe({"status": {"conditions": [valid, degraded]}}, [make_pod("e-1"), make_pod("e-0", ready=True)])
        assert told == "Degraded EnginesDirty: e-0 is torn; 1 of 2 pods ready; e-1 not ready"

    @pytest.mark.parametrize(
        ("inference", "expected"),
        [
            ({"ready": 2, "current": 2}, True),
            ({"ready": 2, "current": 1}, False),
            ({"ready": 1, "current": 2}, False),
            ({}, False),
        ],
    )
    def test_engines_count_when_they_answer_and_are_current(self, inference: dict[str, int], expected: bool):
        assert all_ready({"spec": {"inference": {"replicas": 2}}, "status": {"inference": inference}}) is expected


class TestFollowingTheTrainer:
    def test_only_whole_lines_of_the_trainer_count(self):
        log = "\n".join(["Loading weights", json.dumps(LINE), '{"other": 1}', json.dumps(LINE)[:40]])
        assert training.parse(log) == [LINE]

    def test_a_row_shows_what_a_version_cost(self):
        row = training.row(LINE)
        assert row.split() == ["4", "3", "0.250", "±", "0.100", "0.90", "710", "1.25", "0123456789abcdef"]
        assert "first push" in training.row({"step": 0, "push": PUSH})

    def test_a_restarted_gang_goes_on_in_the_same_table(self):
        logs = {
            "t-1-0": [{"step": 0, "push": PUSH | {"version": 1}}, LINE | {"push": PUSH | {"version": 2}}],
            "t-2-0": [{"step": 1, "push": PUSH | {"version": 3, "epoch": 2}}],
        }
        cluster = FakeKubectl(logs)
        run = training.Run(cluster, "m")  # type: ignore[arg-type]
        assert [line["push"]["version"] for line in run.look()] == [1, 2, 3]
        assert run.look() == []
        cluster.logs["t-2-0"].append(LINE | {"push": PUSH | {"version": 4, "epoch": 2}})
        assert [line["push"]["version"] for line in run.look()] == [4]
        assert [each.version for each in run.rewards()] == [3, 3]
        assert run.last is not None and run.last["push"]["version"] == 4

    def test_the_last_checkpoint_told_is_the_one_compared(self):
        lines = [
            LINE | {"step": step, "checkpoint": f"/data/{step}" if step % 5 == 0 else None} for step in range(1, 12)
        ]
        assert training.checkpoint_of(lines) == (10, "/data/10")
        assert training.checkpoint_of(lines[:3]) is None


class FakeKubectl:
    """First ranks with their logs, and a second rank that is never read."""

    def __init__(self, logs: dict[str, list[dict[str, Any]]]) -> None:
        self.logs = logs

    def list(self, kind: str, selector: str) -> list[dict[str, Any]]:
        index = "batch.kubernetes.io/job-completion-index"
        running = {"containerStatuses": [{"state": {"running": {}}}]}
        first = [{"metadata": {"name": name, "annotations": {index: "0"}}, "status": running} for name in self.logs]
        starting = {"metadata": {"name": "t-3-0", "annotations": {index: "0"}}, "status": {}}
        return [*first, starting, {"metadata": {"name": "t-2-1", "annotations": {index: "1"}}, "status": running}]

    def run(self, *words: str) -> str:
        return "\n".join(json.dumps(line) for line in self.logs[words[1]])


def stateful_set() -> dict[str, Any]:
    volumes = [{"name": name, "emptyDir": {}} for name in ("contract", "auth", "shm", "tmp", "model")]
    container = {
        "name": "engine",
        "image": "runtime",
        "command": ["/usr/bin/tini", "--", "python", "-m", "weightsync.vllm.serve", "/models/m"],
        "args": ["--served-model-name", "m", "--enforce-eager"],
        "env": [{"name": "WEIGHTSYNC_CONFIG", "value": "/etc/c.json"}, {"name": "VLLM_PLUGINS", "value": "weightsync"}],
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
        "readinessProbe": {"httpGet": {"path": "/weightsync/v1/ready", "port": 8000}},
        "livenessProbe": {},
        "volumeMounts": [{"name": each["name"], "mountPath": f"/{each['name']}"} for each in volumes[:4]]
        + [{"name": "model", "mountPath": "/models/m"}],
    }
    template = {"metadata": {"labels": {"app": "m"}}, "spec": {"containers": [container], "volumes": volumes}}
    return {"spec": {"template": template}}


class TestTheFreshEngine:
    def test_it_is_the_live_engine_on_another_checkpoint(self):
        container = fresh_pod(stateful_set(), name=FRESH_POD, checkpoint="/data/step-3")["spec"]["containers"][0]
        assert container["command"] == ["/usr/bin/tini", "--", "python", "-m", "weightsync.vllm.serve", "/data/step-3"]
        assert container["args"] == ["--served-model-name", "m", "--enforce-eager"]
        assert container["image"] == "runtime"

    def test_it_is_no_member_of_the_session_and_gets_no_traffic(self):
        made = fresh_pod(stateful_set(), name=FRESH_POD, checkpoint="/data/step-3")
        container = made["spec"]["containers"][0]
        assert [variable["name"] for variable in container["env"]] == ["VLLM_PLUGINS"]
        assert "labels" not in made["metadata"]
        assert {volume["name"] for volume in made["spec"]["volumes"]} == {"shm", "tmp", "data"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {"shm", "tmp", "data"}
        assert container["readinessProbe"]["httpGet"]["path"] == "/health"

    def test_a_command_that_names_its_model_otherwise_is_told_and_not_guessed(self):
        other = stateful_set()
        other["spec"]["template"]["spec"]["containers"][0]["command"][-1] = "/elsewhere"
        with pytest.raises(LabError, match="does not name its model's folder '/models/m'"):
            fresh_pod(other, name=FRESH_POD, checkpoint="/data/step-3")


def test_the_asking_pod_has_no_rights():
    spec = client_pod("runtime")["spec"]
    assert spec["automountServiceAccountToken"] is False and spec["securityContext"]["runAsNonRoot"] is True
    assert spec["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_example_names_the_folders_that_the_lab_and_the_demo_use():
    spec = yaml.safe_load(EXAMPLE.read_text())["spec"]
    assert spec["model"]["hostPath"].startswith("/var/lib/weightsync/models/")
    folder = f"/data/{yaml.safe_load(EXAMPLE.read_text())['metadata']['name']}"
    assert spec["trainer"]["args"][-2:] == ["--hold-file", f"{folder}/hold"]
    assert f"{folder}/checkpoints" in spec["trainer"]["args"]


class TestTheTimeline:
    def test_a_phase_is_timed_and_shown_with_its_budget(self):
        text = io.StringIO()
        timeline = Timeline(Console(file=text, width=200))
        with timeline.phase("model", budget_s=60) as step:
            step.cached = True
            step.say("converts")
            step.say("converts")
        assert timeline.timings["model"].cached and timeline.timings["model"].budget_s == 60
        assert text.getvalue().count("of 60 s: converts") == 1
        assert "already there in" in text.getvalue()

    def test_a_phase_that_fails_is_named_and_passes_its_error_on(self):
        text = io.StringIO()
        timeline = Timeline(Console(file=text, width=200))
        with pytest.raises(LabError, match="no engine"), timeline.phase("engines", budget_s=60):
            raise LabError("no engine", cure="look")
        assert "engines      failed after" in text.getvalue() and timeline.timings == {}
