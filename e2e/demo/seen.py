"""Puts what a cluster is waiting for into one line: conditions of the WeightSync, pods with the reason they are not ready.

Pure: takes the JSON that kubectl gives.
"""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]
FAULTS = ("Failed", "Degraded")
QUIET = ("Completed", "PodInitializing", "ContainerCreating")


def condition(resource: Manifest, kind: str) -> Manifest:
    """The condition of that type; {} while it is not told."""
    told = resource.get("status", {}).get("conditions", [])
    return next((each for each in told if each["type"] == kind), {})


def holds(resource: Manifest, kind: str) -> bool:
    return condition(resource, kind).get("status") == "True"


def describe(resource: Manifest, pods: list[Manifest]) -> str:
    """What is not there yet, in words."""
    spec_valid = condition(resource, "SpecValid")
    if spec_valid.get("status") != "True":
        return f"spec: {spec_valid.get('reason', 'not looked at yet')} {spec_valid.get('message', '')}".strip()
    faults = [each for kind in FAULTS if (each := condition(resource, kind)).get("status") == "True"]
    words = [f"{each['type']} {each['reason']}: {each.get('message', '')}" for each in faults]
    missing = [pod for pod in sorted(pods, key=_name) if not is_ready(pod)]
    count = f"{len(pods) - len(missing)} of {len(pods)} pods ready"
    return "; ".join([*words, count, *(pod_line(pod) for pod in missing)])


def pod_line(pod: Manifest) -> str:
    """A pod's name and phase, or what keeps it from being ready."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        state = container.get("state", {})
        stopped = state.get("waiting") or state.get("terminated") or {}
        reason = stopped.get("reason")
        if reason and reason not in QUIET:
            return f"{_name(pod)} {reason} (restarts {container.get('restartCount', 0)}) {stopped.get('message', '')}".strip()
    if is_ready(pod):
        return f"{_name(pod)} ready"
    unscheduled = next((each for each in status.get("conditions", []) if each.get("reason") == "Unschedulable"), None)
    if unscheduled is not None:
        return f"{_name(pod)} unschedulable: {unscheduled.get('message', '')}"
    phase = status.get("phase", "not seen")
    return f"{_name(pod)} {'not ready' if phase == 'Running' else phase.lower()}"


def is_ready(pod: Manifest) -> bool:
    """Whether the kubelet calls the pod ready."""
    told = pod.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in told)


def _name(pod: Manifest) -> str:
    return pod["metadata"]["name"]
