"""GPUs and NICs of trainer and engine pods, as each kind of fabric hands them out. Pure."""

from __future__ import annotations

import json

from weightsync_operator.api.names import Component
from weightsync_operator.plan.build.context import Context, Manifest
from weightsync_operator.plan.fabric import Devices
from weightsync_operator.plan.fabric.choose import GPU_RESOURCE
from weightsync_operator.plan.hashing import digest

MULTUS_ANNOTATION = "k8s.v1.cni.cncf.io/networks"
GKE_DEFAULT_ANNOTATION = "networking.gke.io/default-interface"
GKE_INTERFACES_ANNOTATION = "networking.gke.io/interfaces"
GKE_RESOURCE_PREFIX = "networking.gke.io.networks"
CLAIM_API = "resource.k8s.io/v1"
"""Served by Kubernetes 1.34 and later."""
CLAIM = "devices"
GPU_CLASS = "gpu.nvidia.com"
NIC_CLASS = "dranet.net"
PCIE_ROOT = "resource.kubernetes.io/pcieRoot"


def counted(ctx: Context, gpus: int) -> dict[str, str]:
    """Extended resources of one pod."""
    profile, fabric = ctx.profile, ctx.spec.fabric
    if profile.devices is Devices.CLAIM:
        return {}
    counts = {GPU_RESOURCE: str(gpus)} if gpus else {}
    if profile.devices is Devices.GKE_NETWORKS:
        return counts | {f"{GKE_RESOURCE_PREFIX}/{network}": "1" for network in _gke_networks(ctx)}
    if profile.resource_name is not None:
        counts[fabric.resource_name or profile.resource_name] = str(fabric.count)
    return counts


def network_annotations(ctx: Context) -> dict[str, str]:
    """What makes the networks' interfaces appear in a pod."""
    fabric = ctx.spec.fabric
    if ctx.profile.devices is Devices.GKE_NETWORKS:
        interfaces = [{"interfaceName": "eth0", "network": "default"}]
        interfaces += [
            {"interfaceName": f"rdma{i}", "network": network} for i, network in enumerate(_gke_networks(ctx))
        ]
        return {GKE_DEFAULT_ANNOTATION: "eth0", GKE_INTERFACES_ANNOTATION: json.dumps(interfaces)}
    if not fabric.networks:
        return {}
    # One attachment takes one device: a single name stands for each of them.
    attached = fabric.networks if len(fabric.networks) == fabric.count else fabric.networks * fabric.count
    return {MULTUS_ANNOTATION: ",".join(attached)}


def claim_templates(ctx: Context) -> list[Manifest]:
    """ResourceClaimTemplates of the roles that use devices; none unless devices are claimed."""
    if ctx.profile.devices is not Devices.CLAIM:
        return []
    return [_claim_template(ctx, component) for component in ctx.session_roles]


def pod_claims(ctx: Context, component: Component) -> Manifest:
    """The part of a pod's spec that makes a claim of its template."""
    if ctx.profile.devices is not Devices.CLAIM:
        return {}
    name = _claim_template(ctx, component)["metadata"]["name"]
    return {"resourceClaims": [{"name": CLAIM, "resourceClaimTemplateName": name}]}


def container_claims(ctx: Context) -> Manifest:
    """The part of a container's resources that uses the pod's claim."""
    return {"claims": [{"name": CLAIM}]} if ctx.profile.devices is Devices.CLAIM else {}


def _gke_networks(ctx: Context) -> tuple[str, ...]:
    fabric = ctx.spec.fabric
    return fabric.networks or tuple(f"rdma-{index}" for index in range(fabric.count))


def _claim_template(ctx: Context, component: Component) -> Manifest:
    """Named by its content: the API server lets nobody change one."""
    spec = ctx.spec
    gpus = {Component.TRAINER: spec.trainer.gpus_per_node, Component.INFERENCE: spec.inference.gpus}.get(component, 0)
    claim = {"devices": _claimed(gpus, spec.fabric.count, spec.fabric.device_class or NIC_CLASS)}
    return {
        "apiVersion": CLAIM_API,
        "kind": "ResourceClaimTemplate",
        "metadata": ctx.metadata(ctx.child(f"{component.value}-{digest(claim, 8)}"), component),
        "spec": {"spec": claim},
    }


def _claimed(gpus: int, nics: int, nic_class: str) -> Manifest:
    """One request a device, so that GPU i and NIC i can be held to one PCIe root (39 GB/s against 27.5 unaligned)."""
    requests = [_request(f"gpu-{i}", GPU_CLASS) for i in range(gpus)] + [
        _request(f"nic-{i}", nic_class) for i in range(nics)
    ]
    pairs = [{"requests": [f"gpu-{i}", f"nic-{i}"], "matchAttribute": PCIE_ROOT} for i in range(min(gpus, nics))]
    return {"requests": requests, **({"constraints": pairs} if pairs else {})}


def _request(name: str, device_class: str) -> Manifest:
    return {"name": name, "exactly": {"deviceClassName": device_class, "allocationMode": "ExactCount", "count": 1}}
