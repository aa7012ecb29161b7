"""The ModelExpress server, by which trainer and engines find each other. Its metadata lives in the managed Redis. Pure."""

from __future__ import annotations

from weightsync_operator.api.names import Component
from weightsync_operator.plan.build.context import (
    MODEL_EXPRESS_METRICS_PORT,
    MODEL_EXPRESS_PORT,
    REDIS_PORT,
    Context,
    Manifest,
    selector_labels,
)
from weightsync_operator.plan.build.pod import container_security, env_list, pod_template, resources


def deployment(ctx: Context) -> Manifest:
    """One server; it exits after 10 s without Redis, and its restart is the way it waits for one."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": ctx.metadata(ctx.child("mx"), Component.MODEL_EXPRESS),
        "spec": {
            "replicas": 1,
            "revisionHistoryLimit": 2,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": selector_labels(ctx.owner.name, Component.MODEL_EXPRESS)},
            "template": pod_template(ctx, Component.MODEL_EXPRESS, _pod(ctx)),
        },
    }


def _pod(ctx: Context) -> Manifest:
    return {
        "terminationGracePeriodSeconds": 10,
        "containers": [_container(ctx)],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }


def _container(ctx: Context) -> Manifest:
    url = {"secretKeyRef": {"name": ctx.child("auth"), "key": "mx-redis-url"}}
    return {
        "name": "modelexpress",
        "image": ctx.spec.model_express.image or ctx.defaults.model_express_image,
        "imagePullPolicy": ctx.defaults.pull_policy,
        "command": ["modelexpress-server"],
        "args": ["--port", str(MODEL_EXPRESS_PORT), "--metrics-port", str(MODEL_EXPRESS_METRICS_PORT)],
        "env": [
            *env_list({"MX_METADATA_BACKEND": "redis", "MODEL_EXPRESS_CACHE_DIRECTORY": "/tmp/cache"}),
            {"name": "REDIS_URL", "valueFrom": url},
        ],
        "ports": [
            {"name": "grpc", "containerPort": MODEL_EXPRESS_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": MODEL_EXPRESS_METRICS_PORT, "protocol": "TCP"},
        ],
        "resources": resources(ctx.spec.model_express.resources, cpu="50m", memory="64Mi"),
        "securityContext": container_security(read_only_root=True),
        "readinessProbe": {"tcpSocket": {"port": MODEL_EXPRESS_PORT}, "periodSeconds": 2, "timeoutSeconds": 2},
        "livenessProbe": {
            "exec": {"command": ["bash", "-c", _alive(ctx)]},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 4,
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }


def _alive(ctx: Context) -> str:
    """A command that fails when the server is gone, or holds no connection to a Redis that would accept one.

    Once its Redis was away for two seconds MX 0.7 waits 60 to 120 s between two tries, and every call to it hangs
    meanwhile (docs/decisions/0004). /proc/net/tcp names ports in hexadecimal; state 01 is an established connection.
    """
    redis_up = f"timeout 2 bash -c '</dev/tcp/{ctx.child('redis')}/{REDIS_PORT}' 2>/dev/null"
    connected = f"grep -qsE ':{REDIS_PORT:04X} 01 ' /proc/net/tcp /proc/net/tcp6"
    return f"</dev/tcp/127.0.0.1/{MODEL_EXPRESS_PORT} || exit 1; {redis_up} || exit 0; {connected}"
