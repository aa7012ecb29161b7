"""What pods of all kinds have in common: security, volumes, resources and environment. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsync_operator.api.fields import Resources
from weightsync_operator.api.names import ANNOTATION_AUTH, LABEL_SESSION, Component
from weightsync_operator.plan.build.context import Context, Manifest
from weightsync_operator.plan.fabric import Memlock

RUN_AS = 10001
INIT = "/usr/bin/tini"
"""PID 1 of trainers and engines: Python as PID 1 ignores SIGTERM and would write on beside the next gang."""
CONTRACT_FOLDER = "/etc/weightsync"
SECRETS_FOLDER = "/var/run/weightsync"
GPU_RESOURCE = "nvidia.com/gpu"
READ_BY_GROUP = 0o440


def pod_template(ctx: Context, component: Component, spec: Manifest) -> Manifest:
    """A PodTemplateSpec with the labels by which the pod is found and the fingerprint of its passwords."""
    return {
        "metadata": {"labels": ctx.labels(component), "annotations": {ANNOTATION_AUTH: ctx.auth}},
        "spec": {
            "serviceAccountName": ctx.owner.name,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": pod_security(),
            **spec,
        },
    }


def session_pod_template(ctx: Context, component: Component, spec: Manifest) -> Manifest:
    """As `pod_template`, of the session: Redis and ModelExpress outlive sessions, trainers and engines do not."""
    template = pod_template(ctx, component, spec)
    template["metadata"]["labels"][LABEL_SESSION] = ctx.session
    return template


def pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": RUN_AS,
        "runAsGroup": RUN_AS,
        "fsGroup": RUN_AS,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security(*, read_only_root: bool = False) -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": read_only_root,
    }


def fabric_security(ctx: Context) -> Manifest:
    """As `container_security`, with what the fabric needs to pin memory."""
    security = container_security()
    if ctx.profile.memlock is Memlock.ROOT_WITH_IPC_LOCK:
        security |= {"runAsUser": 0, "runAsNonRoot": False, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}
    return security


def resources(wanted: Resources, *, cpu: str, memory: str) -> Manifest:
    """Small requests unless the spec says otherwise; limits only if the spec says so."""
    requests = {name: str(value) for name, value in wanted.requests.items()}
    limits = {name: str(value) for name, value in wanted.limits.items()}
    return {"requests": {"cpu": cpu, "memory": memory, **requests}, **({"limits": limits} if limits else {})}


def device_resources(ctx: Context, gpus: int, *, cpu: str, memory: str) -> Manifest:
    """GPUs and RDMA devices; extended resources need limits = requests."""
    devices: dict[str, str] = {}
    if gpus:
        devices[GPU_RESOURCE] = str(gpus)
    if ctx.profile.resource_name is not None:
        devices[ctx.spec.fabric.resource_name or ctx.profile.resource_name] = str(ctx.spec.fabric.count)
    return {"requests": {"cpu": cpu, "memory": memory, **devices}, **({"limits": devices} if devices else {})}


def env_list(values: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in values.items()]


def field_env(**paths: str) -> list[Manifest]:
    """Variables from the downward API."""
    return [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in paths.items()]


def runtime_env(ctx: Context) -> list[Manifest]:
    """What every process with the runtime in it gets."""
    values = {
        "WEIGHTSYNC_CONFIG": f"{CONTRACT_FOLDER}/contract.json",
        "HOME": "/tmp",
        "XDG_CACHE_HOME": "/tmp/.cache",
        # The model is mounted: nothing may wait for a hub.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        **ctx.profile.env,
        **ctx.spec.fabric.ucx,
    }
    facts = field_env(
        POD_NAME="metadata.name", POD_UID="metadata.uid", POD_IP="status.podIP", NODE_NAME="spec.nodeName"
    )
    return env_list(values) + facts


def runtime_volumes(ctx: Context, contract_name: str) -> list[Manifest]:
    """Contract, the two secrets that a runtime needs, the model, /dev/shm and a writable /tmp."""
    items = [{"key": "redis-password", "path": "redis-password"}, {"key": "endpoint-token", "path": "endpoint-token"}]
    return [
        {"name": "contract", "configMap": {"name": contract_name}},
        {"name": "auth", "secret": {"secretName": ctx.child("auth"), "defaultMode": READ_BY_GROUP, "items": items}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": ctx.profile.shm_size}},
        {"name": "tmp", "emptyDir": {}},
        *model_volumes(ctx),
    ]


def runtime_mounts(ctx: Context) -> list[Manifest]:
    return [
        {"name": "contract", "mountPath": CONTRACT_FOLDER, "readOnly": True},
        {"name": "auth", "mountPath": SECRETS_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
        *model_mounts(ctx),
    ]


def model_volumes(ctx: Context) -> list[Manifest]:
    model = ctx.spec.model
    if model.host_path is not None:
        # type Directory: without it the container runtime makes the missing folder on the node, empty.
        return [{"name": "model", "hostPath": {"path": model.host_path, "type": "Directory"}}]
    if model.persistent_volume_claim is not None:
        claim = {"claimName": model.persistent_volume_claim.claim_name, "readOnly": True}
        return [{"name": "model", "persistentVolumeClaim": claim}]
    return []


def model_mounts(ctx: Context) -> list[Manifest]:
    if ctx.spec.model.path is not None:
        return []
    mount: dict[str, Any] = {"name": "model", "mountPath": ctx.model_path, "readOnly": True}
    claim = ctx.spec.model.persistent_volume_claim
    if claim is not None and claim.sub_path is not None:
        mount["subPath"] = claim.sub_path
    return [mount]
