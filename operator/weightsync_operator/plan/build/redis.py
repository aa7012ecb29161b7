"""Redis, which holds the ledger of versions: one pod, append-only file on its own volume, users from the Secret. Pure."""

from __future__ import annotations

from weightsync_operator.api.names import Component
from weightsync_operator.plan.build.auth import PROBE_USER
from weightsync_operator.plan.build.context import REDIS_PORT, Context, Manifest, selector_labels
from weightsync_operator.plan.build.pod import READ_BY_GROUP, container_security, pod_template, resources

_ACL_FOLDER = "/etc/weightsync-redis"


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


def _pod(ctx: Context) -> Manifest:
    items = [{"key": "users.acl", "path": "users.acl"}]
    return {
        "terminationGracePeriodSeconds": 10,
        "containers": [_container(ctx)],
        "volumes": [
            {"name": "acl", "secret": {"secretName": ctx.child("auth"), "defaultMode": READ_BY_GROUP, "items": items}},
            # On a volume of the pod, so that a restarted container finds its data again.
            {"name": "data", "emptyDir": {}},
        ],
    }


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
        "ping",
    ]
    return {
        "name": "redis",
        "image": ctx.spec.redis.image or ctx.defaults.redis_image,
        "imagePullPolicy": ctx.defaults.pull_policy,
        "command": ["redis-server"],
        "args": [
            *("--port", str(REDIS_PORT), "--bind", "*", "-::*", "--protected-mode", "no"),
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
        ],
    }
