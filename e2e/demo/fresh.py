"""A freshly started engine on the trainer's checkpoint, to hold the live engines against.

It is the live engine's own pod, with what makes it a member of the session taken out: the same image, arguments, environment
and plug-in, so that the same kernels run. Imports the demo's own modules.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

from e2e.demo.client import DATA_ON_NODE
from e2e.demo.cluster import INFERENCE_PORT, LOOK_S, Demo, engine_url
from e2e.demo.questions import GREEDY_PROMPTS, greedy_answers, mismatches
from e2e.demo.report import FreshEngine
from e2e.demo.seen import is_ready, pod_line
from e2e.demo.timeline import Step
from e2e.demo.training import Run, checkpoint_of
from e2e.lab.errors import LabError

Manifest = dict[str, Any]
CONTAINER = "engine"
MEMBER_VARIABLE = "WEIGHTSYNC_CONFIG"
KEPT_VOLUMES = ("shm", "tmp")
FRESH_POD = "weightsync-demo-fresh"
FRESH_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the trainer saved at its last step."""

    step: int
    folder: str


def begin_fresh(demo: Demo, step: Step, run: Run) -> Checkpoint:
    """Start an engine on the trainer's last checkpoint. Raises LabError when it was not saved at the last step."""
    saved = checkpoint_of(run.lines)
    if saved is None or run.last is None or saved[0] != run.last["step"]:
        raise LabError(
            f"the trainer saved no checkpoint at its last step (last: {saved})", cure="look at the trainer's log"
        )
    step.line(f"starts a fresh engine on {saved[1]}, and asks the live ones meanwhile")
    start_fresh(demo, saved[1])
    return Checkpoint(*saved)


def compare(demo: Demo, step: Step, checkpoint: Checkpoint) -> FreshEngine:
    """Greedy answers of every live engine against those of the fresh one."""
    live = {pod["metadata"]["name"]: engine_url(pod) for pod in demo.engines()}
    answers = greedy_answers(demo.client, live)
    fresh_url = await_fresh(demo, step)
    wanted = greedy_answers(demo.client, {FRESH_POD: fresh_url})[FRESH_POD]
    demo.kubectl.delete("pod", FRESH_POD)
    found = mismatches(answers, wanted)
    tokens = sum(len(answer) for answer in wanted) * len(live)
    step.line(f"{len(GREEDY_PROMPTS)} answers of {len(live)} engines, {tokens} tokens: {len(found)} differ")
    return FreshEngine(
        checkpoint=checkpoint.folder,
        step=checkpoint.step,
        prompts=len(GREEDY_PROMPTS),
        tokens=tokens,
        engines=sorted(live),
        mismatches=found,
    )


def start_fresh(demo: Demo, checkpoint: str) -> None:
    """Make the pod of an engine on `checkpoint`."""
    stateful_set = demo.kubectl.get("statefulset", f"{demo.name}-inference")
    if stateful_set is None:
        raise LabError(f"there is no StatefulSet {demo.name}-inference", cure="kubectl get statefulsets")
    demo.kubectl.delete("pod", FRESH_POD)
    demo.kubectl.apply(fresh_pod(stateful_set, name=FRESH_POD, checkpoint=checkpoint))


def await_fresh(demo: Demo, step: Step) -> str:
    """The URL of the fresh engine, once it is ready."""
    started = time.monotonic()
    while True:
        pod = demo.kubectl.get("pod", FRESH_POD) or {"metadata": {"name": FRESH_POD}}
        seen = pod_line(pod)
        if is_ready(pod):
            return engine_url(pod)
        if pod.get("status", {}).get("phase") == "Failed" or time.monotonic() - started > FRESH_TIMEOUT_S:
            raise LabError(f"the fresh engine is not ready: {seen}", cure=f"kubectl logs {FRESH_POD}")
        step.say(seen)
        time.sleep(LOOK_S)


def fresh_pod(stateful_set: Manifest, *, name: str, checkpoint: str) -> Manifest:
    """A Pod that serves `checkpoint` (a folder below /data) as the engines of `stateful_set` serve their model.

    Raises LabError when the engine's command does not hold its model's folder.
    """
    template = copy.deepcopy(stateful_set["spec"]["template"]["spec"])
    container = next(each for each in template["containers"] if each["name"] == CONTAINER)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    container["command"] = _with_model(container["command"], mounts.get("model", ""), checkpoint)
    container["env"] = [variable for variable in container["env"] if variable["name"] != MEMBER_VARIABLE]
    container["volumeMounts"] = [
        *(mount for mount in container["volumeMounts"] if mount["name"] in KEPT_VOLUMES),
        {"name": "data", "mountPath": "/data", "readOnly": True},
    ]
    for probe in ("livenessProbe", "startupProbe"):
        container.pop(probe, None)
    container["readinessProbe"] = {"httpGet": {"path": "/health", "port": INFERENCE_PORT}, "periodSeconds": 1}
    container["resources"] = {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 5,
            "securityContext": template.get("securityContext", {}),
            "containers": [container],
            "volumes": [
                *(volume for volume in template["volumes"] if volume["name"] in KEPT_VOLUMES),
                {"name": "data", "hostPath": {"path": DATA_ON_NODE, "type": "Directory"}},
            ],
        },
    }


def _with_model(command: list[str], model: str, checkpoint: str) -> list[str]:
    if not model or model not in command:
        raise LabError(
            f"the engine's command {command} does not name its model's folder {model!r}", cure="adapt e2e/demo/fresh.py"
        )
    return [checkpoint if word == model else word for word in command]
