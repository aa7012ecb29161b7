"""The last resort: one pod that pushes the newest checkpoint when neither a trainer nor a peer holds the committed version. Pure.

The stored template belongs to no version; `job_for_version` makes the one attempt that follows the loss of one.
"""

from __future__ import annotations

import copy

from weightsync_operator.api.names import ANNOTATION_TEMPLATE, LABEL_LOST_VERSION, Component
from weightsync_operator.api.spec import CheckpointSpec
from weightsync_operator.plan.build.context import Context, Manifest
from weightsync_operator.plan.build.pod import (
    INIT,
    device_resources,
    env_list,
    fabric_security,
    runtime_env,
    runtime_mounts,
    runtime_volumes,
    session_pod_template,
    set_env,
    source_mounts,
    source_volumes,
)
from weightsync_operator.plan.hashing import digest
from weightsync_operator.plan.overlay import overlay_pod_template

CHECKPOINT_FOLDER = "/checkpoint"
LOST_VERSION_ENV = "WEIGHTSYNC_LOST_VERSION"
FIELD = "spec.transfer.checkpoint"
RETRIES = 3
"""Kubernetes starts the pod so often again, with a growing pause; a pod that lost a race with an engine's start does better."""


def job_template(ctx: Context, contract_name: str) -> Manifest | None:
    """A Job without a version; None without a checkpoint. Raises SpecError if podTemplate cannot be laid over it."""
    checkpoint = ctx.spec.transfer.checkpoint
    if checkpoint is None:
        return None
    template = session_pod_template(ctx, Component.RESTORE, _pod(ctx, checkpoint, contract_name))
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": ctx.metadata(ctx.child("restore"), Component.RESTORE),
        "spec": {
            "backoffLimit": RETRIES,
            "podReplacementPolicy": "Failed",
            "template": overlay_pod_template(template, checkpoint.pod_template, f"{FIELD}.podTemplate"),
        },
    }


def job_for_version(template: Manifest, version: int) -> Manifest:
    """The attempt that follows the loss of `version`; another template is another attempt."""
    job = copy.deepcopy(template)
    template_hash = restore_hash(template)
    job["metadata"]["name"] += f"-{digest([template_hash, version], 8)}"
    job["metadata"]["labels"][LABEL_LOST_VERSION] = str(version)
    job["metadata"].setdefault("annotations", {})[ANNOTATION_TEMPLATE] = template_hash
    set_env(job, LOST_VERSION_ENV, str(version))
    return job


def restore_hash(template: Manifest) -> str:
    """Changes when an attempt that runs is of an older spec."""
    return digest(template["spec"], 16)


def _pod(ctx: Context, checkpoint: CheckpointSpec, contract_name: str) -> Manifest:
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 10,
        "containers": [_container(ctx, checkpoint)],
        "volumes": [*runtime_volumes(ctx, contract_name), *source_volumes("checkpoint", checkpoint)],
    }


def _container(ctx: Context, checkpoint: CheckpointSpec) -> Manifest:
    folder = checkpoint.path or CHECKPOINT_FOLDER
    return {
        "name": "restore",
        "image": ctx.defaults.runtime_image,
        "imagePullPolicy": ctx.defaults.pull_policy,
        # Kubernetes expands $(...): the stored template fits every version.
        "command": [INIT, "--", "weightsync", "push", "--newest", "--if-lost", f"$({LOST_VERSION_ENV})", folder],
        "env": [*env_list({LOST_VERSION_ENV: "0"}), *runtime_env(ctx)],
        "resources": device_resources(ctx, 0, cpu="100m", memory="256Mi"),
        "securityContext": fabric_security(ctx),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [*runtime_mounts(ctx), *source_mounts("checkpoint", checkpoint, CHECKPOINT_FOLDER)],
    }
