"""What `spec.fabric.profile: auto` becomes, from what the nodes offer. Pure.

The caller asks once and keeps the answer with the render: a node that comes or goes later changes no running fleet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from weightsync_operator.api.names import LABEL_EMULATED_DEVICES
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.quantities import quantity

Node = Mapping[str, Any]

GPU_RESOURCE = "nvidia.com/gpu"
EFA_RESOURCE = "vpc.amazonaws.com/efa"
PROBED: tuple[tuple[str, str], ...] = (
    ("ib", "rdma/ib"),
    ("roce", "rdma/roce_gdr"),
    ("gke", "networking.gke.io.networks/rdma-0"),
    ("hca-shared", "rdma/hca_shared_devices_a"),
)
"""(profile, resource that shows it), best first. sriov needs a network's name and dra shows in no node: people name both."""
NAMES_SHOWN = 5
_CONTROL_PLANE = "node-role.kubernetes.io/control-plane"
"""Key of the taint that keeps workloads off such nodes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FabricChoice:
    """The profile in force and the words for it."""

    profile: str
    reason: str


def choose_fabric(nodes: Iterable[Node], *, gpus: bool, count: int) -> FabricChoice:
    """The profile whose device every node that could run a pod offers `count` times; tcp if none is on all of them.

    A device on some nodes only would leave pods pending. Raises SpecError while no such node is ready: a fleet that were put
    on tcp before its GPU nodes joined would stay there.
    """
    usable = [node for node in nodes if _is_ready(node) and (not gpus or _offers(node, GPU_RESOURCE) > 0)]
    what = "nodes with GPUs" if gpus else "nodes"
    if not usable:
        raise SpecError(
            "spec.fabric.profile", f"auto found no ready {what}; it chooses when there are, or name a profile"
        )
    emulated = [node for node in usable if LABEL_EMULATED_DEVICES in (node["metadata"].get("labels") or {})]
    if emulated:
        return _for_emulated(len(emulated), len(usable), what)
    for profile, resource in PROBED:
        without = [node for node in usable if _offers(node, resource) < _needed(profile, count)]
        if not without:
            return FabricChoice(profile=profile, reason=f"auto: each of {len(usable)} {what} offers {resource}")
        if len(without) < len(usable):
            reason = f"auto: {resource} is missing on {_named(without)} of {len(usable)} {what}: bytes travel over tcp"
            return FabricChoice(profile="tcp", reason=f"{reason}; name profile {profile} to use the others alone")
    if any(_offers(node, EFA_RESOURCE) > 0 for node in usable):
        return FabricChoice(
            profile="tcp", reason="auto: the nodes offer EFA, which UCX cannot use: bytes travel over tcp"
        )
    return FabricChoice(profile="tcp", reason=f"auto: no RDMA device on {len(usable)} {what}: bytes travel over tcp")


def _for_emulated(emulated: int, usable: int, what: str) -> FabricChoice:
    """Devices that a lab only pretends have the names of real ones."""
    if emulated == usable:
        return FabricChoice(
            profile="emulated", reason=f"auto: all {usable} {what} are labelled {LABEL_EMULATED_DEVICES}"
        )
    reason = f"auto: {emulated} of {usable} {what} are labelled {LABEL_EMULATED_DEVICES}: bytes travel over tcp"
    return FabricChoice(profile="tcp", reason=reason)


def _needed(profile: str, count: int) -> int:
    """Devices that one node must have for a pod; GKE has one a network."""
    return 1 if profile == "gke" else count


def _is_ready(node: Node) -> bool:
    conditions, spec = node.get("status", {}).get("conditions") or [], node.get("spec", {})
    ready = any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)
    reserved = any(taint["key"] == _CONTROL_PLANE for taint in spec.get("taints") or [])
    return ready and not reserved and not spec.get("unschedulable", False)


def _offers(node: Node, resource: str) -> int:
    """Devices that pods may have."""
    return quantity((node.get("status", {}).get("allocatable") or {}).get(resource)) or 0


def _named(nodes: list[Node]) -> str:
    names = sorted(node["metadata"]["name"] for node in nodes)
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
