"""What the phases share: the resource, its pods, the pod that asks, and the wait for them. Imports the demo's own modules."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import yaml

from e2e.demo.client import Client
from e2e.demo.kubectl import Kubectl
from e2e.demo.model import IMAGE
from e2e.demo.seen import describe, holds
from e2e.demo.timeline import Step, Timeline
from e2e.lab.errors import LabError
from e2e.lab.paths import REPOSITORY, LabPaths

EXAMPLE = REPOSITORY / "examples" / "smollm2" / "weightsync.yaml"
NAMESPACE = "default"
INFERENCE_PORT = 8000
LOOK_S = 1.0


class Demo:
    """What the phases share."""

    def __init__(self, timeline: Timeline, paths: LabPaths) -> None:
        self.timeline = timeline
        self.paths = paths
        self.name: str = yaml.safe_load(EXAMPLE.read_text())["metadata"]["name"]
        self.kubectl = Kubectl(program=paths.bin / "kubectl", kubeconfig=paths.kubeconfig, namespace=NAMESPACE)
        self.client = Client(self.kubectl, image=IMAGE)
        self.service_url = f"http://{self.name}-inference:{INFERENCE_PORT}"

    def resource(self) -> dict[str, Any]:
        """The WeightSync. Raises LabError when it is gone: nothing of the demo deletes it once it is applied."""
        found = self.kubectl.get("weightsync", self.name)
        if found is None:
            raise LabError(
                f"WeightSync {NAMESPACE}/{self.name} is gone: somebody else deleted it",
                cure="run the demo again while nobody uses its cluster",
            )
        return found

    def pods(self) -> list[dict[str, Any]]:
        """All pods of the resource."""
        return self.kubectl.list("pods", f"app.kubernetes.io/instance={self.name}")

    def engines(self) -> list[dict[str, Any]]:
        return [pod for pod in self.pods() if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "inference"]

    def wait(self, step: Step, met: Callable[[dict[str, Any]], bool], what: str, timeout_s: float) -> dict[str, Any]:
        """Look at the resource until `met`, saying meanwhile what is not there yet. Fails at once when it is Failed."""
        while True:
            resource, pods = self.resource(), self.pods()
            seen = describe(resource, pods)
            if met(resource):
                return resource
            if holds(resource, "Failed"):
                raise LabError(f"{what}: {seen}", cure=f"kubectl describe weightsync {self.name}")
            if step.elapsed_s > timeout_s:
                raise LabError(
                    f"{what}: not after {timeout_s:.0f} s; {seen}", cure=f"kubectl describe weightsync {self.name}"
                )
            step.say(seen)
            time.sleep(LOOK_S)


def all_ready(resource: dict[str, Any]) -> bool:
    """Every wanted engine answers requests and holds the version in force."""
    inference, wanted = resource.get("status", {}).get("inference", {}), resource["spec"]["inference"]["replicas"]
    return inference.get("ready") == wanted and inference.get("current") == wanted


def engine_url(pod: dict[str, Any]) -> str:
    """Address of one engine, past every Service."""
    return f"http://{pod['status']['podIP']}:{INFERENCE_PORT}"
