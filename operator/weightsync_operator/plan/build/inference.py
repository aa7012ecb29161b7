"""The fleet of vLLM engines: a StatefulSet whose pods say themselves whether their weights may be served. Pure."""

from __future__ import annotations

from weightsync_operator.api.names import ANNOTATION_FABRIC, Component
from weightsync_operator.plan.build.context import INFERENCE_PORT, Context, Manifest, selector_labels
from weightsync_operator.plan.build.pod import (
    INIT,
    device_resources,
    env_list,
    fabric_security,
    runtime_env,
    runtime_mounts,
    runtime_volumes,
    session_pod_template,
)
from weightsync_operator.plan.fabric import FabricChoice
from weightsync_operator.plan.overlay import overlay_pod_template

ENGINE = "engine"
"""Name of the container."""
GRACE_S = 30
"""From SIGTERM until the kubelet kills it: longer than an engine takes to answer what it has begun (`weightsync.vllm.serve`)."""
READY_PATH = "/weightsync/v1/ready"
LIVE_PATH = "/weightsync/v1/live"


def stateful_set(ctx: Context, contract_name: str) -> Manifest:
    """The fleet at the spec's replicas. Raises SpecError if podTemplate cannot be laid over it."""
    template = session_pod_template(ctx, Component.INFERENCE, _pod(ctx, contract_name))
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": ctx.metadata(ctx.child("inference"), Component.INFERENCE) | _choice(ctx),
        "spec": {
            "replicas": ctx.spec.inference.replicas,
            "serviceName": ctx.child("engines"),
            "podManagementPolicy": "Parallel",
            # The StatefulSet drops maxUnavailable silently: the operator evicts instead.
            "updateStrategy": {"type": "OnDelete"},
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": selector_labels(ctx.owner.name, Component.INFERENCE)},
            "template": overlay_pod_template(template, ctx.spec.inference.pod_template, "spec.inference.podTemplate"),
        },
    }


def _choice(ctx: Context) -> Manifest:
    """Why `auto` chose what it did goes with the render, so that it is asked once."""
    return {"annotations": {ANNOTATION_FABRIC: ctx.chosen.reason}} if isinstance(ctx.chosen, FabricChoice) else {}


def _pod(ctx: Context, contract_name: str) -> Manifest:
    return {
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [_container(ctx)],
        "volumes": runtime_volumes(ctx, contract_name),
    }


def _container(ctx: Context) -> Manifest:
    return {
        "name": ENGINE,
        "image": ctx.inference_image,
        "imagePullPolicy": ctx.defaults.pull_policy,
        "command": [INIT, "--", "python", "-m", "weightsync.vllm.serve", ctx.model_path],
        "args": _arguments(ctx),
        "env": _environment(ctx),
        "ports": [{"name": "http", "containerPort": INFERENCE_PORT, "protocol": "TCP"}],
        "resources": device_resources(ctx, ctx.spec.inference.gpus, cpu="100m", memory="512Mi"),
        "securityContext": fabric_security(ctx),
        # Half an hour: a large model loads for minutes, and a restart would begin again.
        "startupProbe": _probe(LIVE_PATH, period_s=5, timeout_s=5, failures=360),
        # The engine refuses stale requests itself, so that three slow answers need not take it out of the Service.
        "readinessProbe": _probe(READY_PATH, period_s=2, timeout_s=3, failures=3),
        "livenessProbe": _probe(LIVE_PATH, period_s=10, timeout_s=10, failures=6),
        "volumeMounts": runtime_mounts(ctx),
    }


def _arguments(ctx: Context) -> list[str]:
    parallelism = ctx.spec.inference.parallelism
    return [
        *("--served-model-name", ctx.model_name),
        *("--host", "0.0.0.0", "--port", str(INFERENCE_PORT)),
        *("--dtype", ctx.spec.model.dtype),
        *("--tensor-parallel-size", str(parallelism.tp)),
        *_data_parallel(parallelism.dp),
        *(("--enable-expert-parallel",) if parallelism.ep > 1 else ()),
        *ctx.spec.inference.engine_args,
    ]


def _data_parallel(size: int) -> tuple[str, ...]:
    """One API server process, which reaches every rank: vLLM would start as many as ranks, and none would know the whole."""
    return ("--data-parallel-size", str(size), "--api-server-count", "1") if size > 1 else ()


def _environment(ctx: Context) -> list[Manifest]:
    values = {
        # Endpoint plug-ins are loaded only when named, and naming one leaves every other out.
        "VLLM_PLUGINS": "weightsync",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": "/tmp/.cache/vllm",
        **ctx.profile.engine_env,
    }
    return [*runtime_env(ctx), *env_list(values)]


def _probe(path: str, *, period_s: int, timeout_s: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": INFERENCE_PORT},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }
