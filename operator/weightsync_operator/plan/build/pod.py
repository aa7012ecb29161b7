"""What pods of all kinds have in common: security, volumes, resources and environment. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsync_operator.api.fields import Resources
from weightsync_operator.api.names import ANNOTATION_AUTH, LABEL_SESSION, Component
from weightsync_operator.api.spec import CheckpointSpec, ModelSpec
from weightsync_operator.plan.build import devices
from weightsync_operator.plan.build.context import MODEL_EXPRESS_AUDIENCE, Context, Manifest
from weightsync_operator.plan.fabric import Memlock

RUN_AS = 10001
INIT = "/usr/bin/tini"
"""PID 1 of trainers and engines: Python as PID 1 ignores SIGTERM and would write on beside the next gang."""
CONTRACT_FOLDER = "/etc/weightsync"
SECRETS_FOLDER = "/var/run/weightsync"
TOKENS_FOLDER = "/var/run/secrets/tokens"
"""Where ModelExpress's client looks for its token."""
MEMBER_TOKEN_S = 3600
READ_BY_GROUP = 0o440
CA_FILE = "redis-ca.crt"
"""In SECRETS_FOLDER, where Redis speaks TLS and its authority is not one that images know."""


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
    """As `pod_template`, of the session and on the fabric: Redis and ModelExpress outlive sessions, trainers and engines do not."""
    template = pod_template(ctx, component, spec | devices.pod_claims(ctx, component))
    template["metadata"]["labels"][LABEL_SESSION] = ctx.session
    template["metadata"]["annotations"] |= devices.network_annotations(ctx)
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
    if ctx.memlock is Memlock.ROOT_WITH_IPC_LOCK:
        security |= {"runAsUser": 0, "runAsNonRoot": False, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}
    return security


def resources(wanted: Resources, *, cpu: str, memory: str) -> Manifest:
    """Small requests unless the spec says otherwise; limits only if the spec says so."""
    requests = {name: str(value) for name, value in wanted.requests.items()}
    limits = {name: str(value) for name, value in wanted.limits.items()}
    return {"requests": {"cpu": cpu, "memory": memory, **requests}, **({"limits": limits} if limits else {})}


def device_resources(ctx: Context, gpus: int, *, cpu: str, memory: str) -> Manifest:
    """GPUs and NICs as the fabric's profile asks for them; extended resources need limits = requests."""
    counted = devices.counted(ctx, gpus)
    requests = {"cpu": cpu, "memory": memory, **counted}
    return {"requests": requests, **({"limits": counted} if counted else {}), **devices.container_claims(ctx)}


def env_list(values: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in values.items()]


def set_env(owner: Manifest, name: str, value: str) -> None:
    """Give a variable that a rendered pod template has another value, in every container that has it."""
    for container in owner["spec"]["template"]["spec"]["containers"]:
        for variable in container.get("env", []):
            if variable["name"] == name:
                variable["value"] = value


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
    return [
        {"name": "contract", "configMap": {"name": contract_name}},
        {"name": "auth", **_auth(ctx)},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": ctx.profile.shm_size}},
        {"name": "tmp", "emptyDir": {}},
        *_member_tokens(ctx),
        *model_volumes(ctx),
    ]


def _member_tokens(ctx: Context) -> list[Manifest]:
    """What a member shows to a ModelExpress that enforces; the kubelet renews it."""
    if not ctx.enforces:
        return []
    token = {"path": "modelexpress", "audience": MODEL_EXPRESS_AUDIENCE, "expirationSeconds": MEMBER_TOKEN_S}
    return [{"name": "member-token", "projected": {"sources": [{"serviceAccountToken": token}]}}]


def _auth(ctx: Context) -> Manifest:
    """The password of an external Redis, and whom to trust, come from the user's own Secrets: no copy is made of them."""
    token, password = {"key": "endpoint-token", "path": "endpoint-token"}, {"path": "redis-password"}
    external = ctx.spec.redis.external
    if external is None:
        sources = [(ctx.child("auth"), [{"key": "redis-password", **password}, token])]
    else:
        theirs = {"key": external.secret_ref.key, **password}
        sources = [(ctx.child("auth"), [token]), (external.secret_ref.name, [theirs])]
    sources += ca_sources(ctx)
    if len(sources) == 1:
        ((name, items),) = sources
        return {"secret": {"secretName": name, "defaultMode": READ_BY_GROUP, "items": items}}
    return projected(sources)


def ca_sources(ctx: Context) -> list[tuple[str, list[Manifest]]]:
    """Secret and item of the certificate that Redis is known by, if it is one of the user's."""
    ca = ctx.spec.redis.ca
    return [] if ca is None else [(ca.name, [{"key": ca.key, "path": CA_FILE}])]


def projected(sources: list[tuple[str, list[Manifest]]]) -> Manifest:
    """A volume with these items of several Secrets, given as (Secret, items)."""
    secrets = [{"secret": {"name": name, "items": items}} for name, items in sources]
    return {"projected": {"defaultMode": READ_BY_GROUP, "sources": secrets}}


def runtime_mounts(ctx: Context) -> list[Manifest]:
    return [
        {"name": "contract", "mountPath": CONTRACT_FOLDER, "readOnly": True},
        {"name": "auth", "mountPath": SECRETS_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
        *({"name": volume["name"], "mountPath": TOKENS_FOLDER, "readOnly": True} for volume in _member_tokens(ctx)),
        *model_mounts(ctx),
    ]


def model_volumes(ctx: Context) -> list[Manifest]:
    return source_volumes("model", ctx.spec.model)


def model_mounts(ctx: Context) -> list[Manifest]:
    return source_mounts("model", ctx.spec.model, ctx.model_path)


def source_volumes(name: str, source: ModelSpec | CheckpointSpec) -> list[Manifest]:
    """The volume of files that are on the nodes or in a claim, read only; none for those that images have."""
    if source.host_path is not None:
        # type Directory: without it the container runtime makes the missing folder on the node, empty.
        return [{"name": name, "hostPath": {"path": source.host_path, "type": "Directory"}}]
    if source.persistent_volume_claim is not None:
        claim = {"claimName": source.persistent_volume_claim.claim_name, "readOnly": True}
        return [{"name": name, "persistentVolumeClaim": claim}]
    return []


def source_mounts(name: str, source: ModelSpec | CheckpointSpec, folder: str) -> list[Manifest]:
    """Where a container finds what `source_volumes` brings."""
    if source.path is not None:
        return []
    mount: dict[str, Any] = {"name": name, "mountPath": folder, "readOnly": True}
    claim = source.persistent_volume_claim
    if claim is not None and claim.sub_path is not None:
        mount["subPath"] = claim.sub_path
    return [mount]
