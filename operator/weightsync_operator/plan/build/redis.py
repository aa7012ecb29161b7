"""Redis, which holds the ledger of versions: one pod, append-only file on a volume, users from the Secret. Pure."""

from __future__ import annotations

from weightsync_operator.api.names import ANNOTATION_CERTIFICATE, Component
from weightsync_operator.plan.build.auth import PROBE_USER
from weightsync_operator.plan.build.context import REDIS_PORT, Context, Manifest, selector_labels
from weightsync_operator.plan.build.pod import READ_BY_GROUP, container_security, pod_template, resources

_ACL_FOLDER = "/etc/weightsync-redis"
_TLS_VOLUME = "tls"
_TLS_FOLDER = "/etc/weightsync-redis-tls"


def deployment(ctx: Context) -> Manifest:
    """Recreate, never two: two Redis behind one Service would be two ledgers."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": ctx.metadata(ctx.child("redis"), Component.REDIS),
        "spec": {
            "replicas": 1,
            "revisionHistoryLimit": 2,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": selector_labels(ctx.owner.name, Component.REDIS)},
            "template": pod_template(ctx, Component.REDIS, _pod(ctx)),
        },
    }


def with_certificate(manifest: Manifest, certificate: str) -> Manifest:
    """Redis reads its certificate at its start: another one is another pod."""
    rendered = manifest["spec"]["template"]
    annotations = {**rendered["metadata"].get("annotations", {}), ANNOTATION_CERTIFICATE: certificate}
    template = {**rendered, "metadata": {**rendered["metadata"], "annotations": annotations}}
    return {**manifest, "spec": {**manifest["spec"], "template": template}}


def certificate_of(manifest: Manifest | None) -> str:
    """Fingerprint of the certificate that a Deployment's pods were started with; empty for none."""
    if manifest is None:
        return ""
    return (manifest["spec"]["template"]["metadata"].get("annotations") or {}).get(ANNOTATION_CERTIFICATE, "")


def certificate_secret_of(manifest: Manifest) -> str:
    """Name of the Secret from which a Deployment's pods take their certificate; empty for none."""
    volumes = manifest["spec"]["template"]["spec"]["volumes"]
    return next((volume["secret"]["secretName"] for volume in volumes if volume["name"] == _TLS_VOLUME), "")


def _pod(ctx: Context) -> Manifest:
    items = [{"key": "users.acl", "path": "users.acl"}]
    return {
        "terminationGracePeriodSeconds": 10,
        "containers": [_container(ctx)],
        "volumes": [
            {"name": "acl", "secret": {"secretName": ctx.child("auth"), "defaultMode": READ_BY_GROUP, "items": items}},
            {"name": "data", **_data(ctx)},
            *_tls_volumes(ctx),
        ],
    }


def _tls_volumes(ctx: Context) -> list[Manifest]:
    tls = ctx.spec.redis.tls
    if tls is None:
        return []
    return [{"name": _TLS_VOLUME, "secret": {"secretName": tls.secret_ref.name, "defaultMode": READ_BY_GROUP}}]


def _data(ctx: Context) -> Manifest:
    """On a volume at least of the pod, so that a restarted container finds its data again."""
    if ctx.spec.redis.persistence is None:
        return {"emptyDir": {}}
    return {"persistentVolumeClaim": {"claimName": ctx.child("redis")}}


def volume_claims(ctx: Context) -> list[Manifest]:
    """The claim of the ledger's volume, if it is to outlive the pod."""
    persistence = ctx.spec.redis.persistence
    if persistence is None:
        return []
    size = {"resources": {"requests": {"storage": str(persistence.size)}}}
    storage = {} if persistence.storage_class_name is None else {"storageClassName": persistence.storage_class_name}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": ctx.metadata(ctx.child("redis"), Component.REDIS),
            "spec": {"accessModes": ["ReadWriteOnce"], **size, **storage},
        }
    ]


def _container(ctx: Context) -> Manifest:
    ping = [
        "redis-cli",
        "-e",
        "-p",
        str(REDIS_PORT),
        "--user",
        PROBE_USER,
        "--pass",
        PROBE_USER,
        "--no-auth-warning",
        *(("--tls", "--cacert", f"{_TLS_FOLDER}/ca.crt") if ctx.spec.redis.speaks_tls else ()),
        "ping",
    ]
    return {
        "name": "redis",
        "image": ctx.spec.redis.image or ctx.defaults.redis_image,
        "imagePullPolicy": ctx.defaults.pull_policy,
        "command": ["redis-server"],
        "args": [
            *_listening(ctx),
            *("--aclfile", f"{_ACL_FOLDER}/users.acl"),
            *("--dir", "/data", "--appendonly", "yes", "--appendfsync", "everysec"),
        ],
        "ports": [{"name": "redis", "containerPort": REDIS_PORT, "protocol": "TCP"}],
        "resources": resources(ctx.spec.redis.resources, cpu="50m", memory="64Mi"),
        "securityContext": container_security(read_only_root=True),
        # A server that still loads its file answers the ping with an error.
        "readinessProbe": {"exec": {"command": ping}, "periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": {
            "tcpSocket": {"port": REDIS_PORT},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
        "volumeMounts": [
            {"name": "acl", "mountPath": _ACL_FOLDER, "readOnly": True},
            {"name": "data", "mountPath": "/data"},
            *([{"name": _TLS_VOLUME, "mountPath": _TLS_FOLDER, "readOnly": True}] if ctx.spec.redis.speaks_tls else []),
        ],
    }


def _listening(ctx: Context) -> list[str]:
    """With TLS nothing is answered in the clear; clients prove themselves by password, not by certificate."""
    anywhere = ["--bind", "*", "-::*", "--protected-mode", "no"]
    if not ctx.spec.redis.speaks_tls:
        return ["--port", str(REDIS_PORT), *anywhere]
    files = {"cert": "tls.crt", "key": "tls.key", "ca-cert": "ca.crt"}
    options = [word for kind, name in files.items() for word in (f"--tls-{kind}-file", f"{_TLS_FOLDER}/{name}")]
    return ["--port", "0", "--tls-port", str(REDIS_PORT), *options, "--tls-auth-clients", "no", *anywhere]
