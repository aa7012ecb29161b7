"""The ModelExpress server, by which trainer and engines find each other. Its metadata lives in the ledger's Redis. Pure."""

from __future__ import annotations

from weightsync_operator.api.names import Component
from weightsync_operator.plan.build.context import (
    MODEL_EXPRESS_AUDIENCE,
    MODEL_EXPRESS_METRICS_PORT,
    MODEL_EXPRESS_PORT,
    REDIS_PORT,
    Context,
    Manifest,
    selector_labels,
)
from weightsync_operator.plan.build.pod import (
    CA_FILE,
    MEMBER_TOKEN_S,
    ca_sources,
    container_security,
    env_list,
    pod_template,
    projected,
    resources,
)
from weightsync_operator.plan.overlay import overlay_pod_template

_ENFORCE = {"name": "MODEL_EXPRESS_SECURITY_MODE", "value": "enforce"}
_CA_FOLDER = "/etc/weightsync-redis-ca"


def accounts(ctx: Context) -> list[Manifest]:
    """An account of its own, when it has something to ask the API server; members have none with any right there."""
    if not ctx.enforces:
        return []
    metadata = ctx.metadata(_account_name(ctx), Component.MODEL_EXPRESS)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
    return [{**account, "automountServiceAccountToken": False}]


def _account_name(ctx: Context) -> str:
    """With a dot: the members of a resource named <name>-mx have an account of that name, which must not be this one."""
    return f"{ctx.owner.name}.mx"


def enforces(deployment: Manifest) -> bool:
    """Whether a rendered ModelExpress checks who calls it."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return any(_ENFORCE in container.get("env", ()) for container in containers)


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
    asking = {"serviceAccountName": _account_name(ctx), "automountServiceAccountToken": True} if ctx.enforces else {}
    return {
        **asking,
        "terminationGracePeriodSeconds": 10,
        "containers": [_container(ctx), *_forwarders(ctx)],
        "volumes": [{"name": "tmp", "emptyDir": {}}, *_ca_volumes(ctx)],
    }


def _forwarders(ctx: Context) -> list[Manifest]:
    """The way to a Redis that speaks TLS, which ModelExpress does not (docs/decisions/0018)."""
    if not ctx.spec.redis.speaks_tls:
        return []
    host, port = ctx.redis_address
    trusting = ["--ca", f"{_CA_FOLDER}/{CA_FILE}"] if ctx.spec.redis.ca is not None else []
    return [
        {
            "name": "redis-tls",
            "image": ctx.defaults.runtime_image,
            "imagePullPolicy": ctx.defaults.pull_policy,
            "command": ["python", "-m", "weightsync.tlsforward"],
            "args": ["--listen", str(REDIS_PORT), "--host", host, "--port", str(port), *trusting],
            "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
            "securityContext": container_security(read_only_root=True),
            "volumeMounts": [{"name": volume["name"], "mountPath": _CA_FOLDER} for volume in _ca_volumes(ctx)],
        }
    ]


def _ca_volumes(ctx: Context) -> list[Manifest]:
    return [{"name": "redis-ca", **projected([source])} for source in ca_sources(ctx)]


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
            *_security(ctx),
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


def _security(ctx: Context) -> list[Manifest]:
    """Members alone are admitted: by a token of their account that was made for ModelExpress.

    What the API server said of a token holds as long as the token can: of 60 s, as by default, an outage would stop every push.
    """
    if not ctx.enforces:
        return []
    admitted = {
        "MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES": MODEL_EXPRESS_AUDIENCE,
        "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS": ",".join(_member_accounts(ctx)),
        "MODEL_EXPRESS_SECURITY_CACHE_TTL_SECS": str(MEMBER_TOKEN_S),
    }
    return [_ENFORCE, *env_list(admitted)]


def _member_accounts(ctx: Context) -> list[str]:
    """Of trainer and engines, as ModelExpress names accounts; each podTemplate may choose another than the resource's own."""
    overlays = {
        "spec.trainer.podTemplate": ctx.spec.trainer.pod_template,
        "spec.inference.podTemplate": ctx.spec.inference.pod_template,
    }
    rendered = {"spec": {"serviceAccountName": ctx.owner.name}}
    pods = [overlay_pod_template(rendered, overlay, field)["spec"] for field, overlay in overlays.items()]
    return sorted({f"{ctx.owner.namespace}:{_account_of(pod)}" for pod in pods})


def _account_of(pod: Manifest) -> str:
    """The account that Kubernetes gives a pod: the deprecated field counts only where the other says nothing."""
    return pod.get("serviceAccountName") or pod.get("serviceAccount") or "default"


def _alive(ctx: Context) -> str:
    """A command that fails when the server is gone, or holds no connection to a Redis that would accept one.

    Once its Redis was away for two seconds MX 0.7 waits 60 to 120 s between two tries, and every call to it hangs
    meanwhile (docs/decisions/0004). /proc/net/tcp names ports in hexadecimal; state 01 is an established connection.
    """
    host, port = ctx.redis_address
    asked = REDIS_PORT if ctx.spec.redis.speaks_tls else port
    redis_up = f"timeout 2 bash -c '</dev/tcp/{host}/{port}' 2>/dev/null"
    connected = f"grep -qsE ':{asked:04X} 01 ' /proc/net/tcp /proc/net/tcp6"
    return f"</dev/tcp/127.0.0.1/{MODEL_EXPRESS_PORT} || exit 1; {redis_up} || exit 0; {connected}"
