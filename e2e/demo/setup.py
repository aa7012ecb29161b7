"""Brings up what the demo needs: the lab, the chart, the resource. Imports the demo's own modules and the lab's paths."""

from __future__ import annotations

import subprocess
import sys

from e2e.demo.cluster import EXAMPLE, Demo
from e2e.demo.kubectl import Kubectl
from e2e.demo.timeline import Step
from e2e.lab.errors import LabError
from e2e.lab.paths import REPOSITORY, LabPaths

OPERATOR_NAMESPACE = "weightsync-system"
RELEASE = "weightsync"
OPERATOR = f"app.kubernetes.io/instance={RELEASE}"


def start_lab() -> None:
    """The lab shows its own progress."""
    status = subprocess.run([sys.executable, "-m", "e2e.lab", "up"], cwd=REPOSITORY, check=False).returncode
    if status != 0:
        raise LabError(f"`python -m e2e.lab up` ended with {status}", cure="its last lines say what to do")


def install_chart(step: Step, paths: LabPaths) -> None:
    """Install or upgrade the operator's chart, and wait until an operator of the present image is ready."""
    kubectl = Kubectl(program=paths.bin / "kubectl", kubeconfig=paths.kubeconfig, namespace=OPERATOR_NAMESPACE)
    was_there = bool(kubectl.list("deployments", OPERATOR))
    helm = [str(paths.bin / "helm"), "--kubeconfig", str(paths.kubeconfig), "upgrade", "--install", RELEASE]
    where = [str(REPOSITORY / "charts" / "weightsync"), "--namespace", OPERATOR_NAMESPACE, "--create-namespace"]
    step.say("helm upgrade --install weightsync charts/weightsync")
    answer = subprocess.run([*helm, *where, "--wait", "--timeout", "180s"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or ["(nothing said)"])[-1]
        raise LabError(f"helm ended with {answer.returncode}: {said}", cure=f"kubectl -n {OPERATOR_NAMESPACE} get pods")
    if was_there:
        # The lab's images keep their tag: helm sees no change where the image behind it is another one.
        step.say("restarts the operator that was there")
        kubectl.run("rollout", "restart", "deployment", "-l", OPERATOR)
        kubectl.run("rollout", "status", "deployment", "-l", OPERATOR, "--timeout=120s", timeout_s=130)


def create(demo: Demo, step: Step) -> None:
    """Apply the example, after whatever an earlier demo left of it is gone; its trainer is held back until `release`."""
    if demo.kubectl.get("weightsync", demo.name) is not None:
        step.say(f"deletes the WeightSync {demo.name} of an earlier run")
        demo.kubectl.delete("weightsync", demo.name)
    step.say("starts the pod that will ask the service")
    demo.client.start()
    demo.client.hold(demo.name)
    step.line(f"kubectl apply -f {EXAMPLE.relative_to(REPOSITORY)}")
    demo.kubectl.run("apply", "-f", str(EXAMPLE))
