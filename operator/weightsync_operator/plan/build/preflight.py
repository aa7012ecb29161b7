"""The preflight pod: the runtime image judges the model before anything else is made. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from weightsync_operator.api.names import Component
from weightsync_operator.plan.build.context import Context, Manifest
from weightsync_operator.plan.build.pod import container_security, env_list, model_mounts, model_volumes, pod_security
from weightsync_operator.plan.hashing import digest
from weightsync_operator.plan.quantities import quantity

_PLACEMENT = ("nodeSelector", "tolerations", "affinity", "imagePullSecrets", "runtimeClassName", "priorityClassName")


def pod(ctx: Context, engines: Manifest) -> Manifest:
    """Runs where the engines of the StatefulSet `engines` would run, with the model mounted and no device."""
    spec = _pod_spec(ctx, engines["spec"]["template"]["spec"])
    key = preflight_hash(spec)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": ctx.metadata(ctx.child(f"preflight-{key}"), Component.PREFLIGHT),
        "spec": spec,
    }


def preflight_hash(spec: Manifest) -> str:
    """Changes when the verdict could: model, sizes, image, placement."""
    return digest(spec, 10)


def model_field(ctx: Context) -> str:
    """Path of the field that says where the model is, for messages."""
    model = ctx.spec.model
    if model.host_path is not None:
        return "spec.model.hostPath"
    return "spec.model.path" if model.path is not None else "spec.model.persistentVolumeClaim"


def _pod_spec(ctx: Context, engines: Manifest) -> Manifest:
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": pod_security(),
        "containers": [_container(ctx, engines)],
        "volumes": [{"name": "tmp", "emptyDir": {}}, *model_volumes(ctx)],
        **{field: engines[field] for field in _PLACEMENT if field in engines},
    }


def _later_questions(ctx: Context, engines: Manifest) -> Manifest:
    """Asked only when there is something to ask: the verdict of an older question stays."""
    inference, budget_gib = ctx.spec.inference, ctx.spec.transfer.staging_budget_gib
    asked = {
        "modelRevision": ctx.spec.model.revision,  # not read there: another one is another question
        "dtype": ctx.spec.model.dtype if ctx.spec.model.dtype != "bfloat16" else None,
        "dataParallel": inference.parallelism.dp if inference.parallelism.dp > 1 else None,
        "expertParallel": inference.parallelism.ep if inference.parallelism.ep > 1 else None,
        "quantization": inference.quantization,
        "stagingBudgetBytes": None if budget_gib is None else budget_gib << 30,
        "hostLimitBytes": _memory_limit(engines) if ctx.spec.transfer.staging == "pinnedHost" else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _memory_limit(engines: Manifest) -> int | None:
    """Bytes that the engine's container may take, as its podTemplate says; what that says wrongly the API server refuses."""
    containers = [c for c in engines.get("containers") or [] if isinstance(c, Mapping) and c.get("name") == "engine"]
    found: Any = containers[0] if containers else None
    for name in ("resources", "limits", "memory"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return quantity(found)


def _container(ctx: Context, engines: Manifest) -> Manifest:
    question = {
        "modelPath": ctx.model_path,
        "modelField": model_field(ctx),
        "tensorParallel": ctx.spec.inference.parallelism.tp,
        **_later_questions(ctx, engines),
    }
    return {
        "name": "preflight",
        "image": ctx.inference_image,
        "imagePullPolicy": ctx.defaults.pull_policy,
        "command": ["python", "-m", "weightsync.preflight"],
        "env": env_list({"WEIGHTSYNC_PREFLIGHT": json.dumps(question, sort_keys=True), "HOME": "/tmp"}),
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
        "securityContext": container_security(read_only_root=True),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, *model_mounts(ctx)],
    }
