"""The trainer's gang: an Indexed Job of which nothing restarts alone. Pure.

The stored template belongs to no epoch; `job_for_epoch` makes one incarnation of it.
"""

from __future__ import annotations

import copy

from weightsync_operator.api.names import ANNOTATION_TEMPLATE, LABEL_EPOCH, Component
from weightsync_operator.api.spec import TRAINER_PORT
from weightsync_operator.plan.build.context import INFERENCE_PORT, Context, Manifest
from weightsync_operator.plan.build.pod import (
    INIT,
    device_resources,
    env_list,
    fabric_security,
    field_env,
    runtime_env,
    runtime_mounts,
    runtime_volumes,
    session_pod_template,
    set_env,
)
from weightsync_operator.plan.hashing import digest
from weightsync_operator.plan.overlay import overlay_pod_template

_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
EPOCH_ENV = "WEIGHTSYNC_EPOCH"


def job_template(ctx: Context, contract_name: str) -> Manifest:
    """A Job without an epoch. Raises SpecError if podTemplate cannot be laid over it."""
    spec = ctx.spec.trainer
    template = session_pod_template(ctx, Component.TRAINER, _pod(ctx, contract_name))
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": ctx.metadata(ctx.child("trainer"), Component.TRAINER),
        "spec": {
            "completionMode": "Indexed",
            "completions": spec.nodes,
            "parallelism": spec.nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": overlay_pod_template(template, spec.pod_template, "spec.trainer.podTemplate"),
        },
    }


def job_for_epoch(template: Manifest, epoch: int) -> Manifest:
    """The incarnation `epoch` of a stored template."""
    job = copy.deepcopy(template)
    job["metadata"]["name"] += f"-{epoch}"
    job["metadata"]["labels"][LABEL_EPOCH] = str(epoch)
    job["metadata"].setdefault("annotations", {})[ANNOTATION_TEMPLATE] = template_hash(template)
    job["spec"]["template"]["metadata"]["labels"][LABEL_EPOCH] = str(epoch)
    set_env(job, EPOCH_ENV, str(epoch))
    return job


def template_hash(template: Manifest) -> str:
    """Changes when running gangs must be replaced."""
    return digest(template["spec"], 16)


def _pod(ctx: Context, contract_name: str) -> Manifest:
    return {
        "restartPolicy": "Never",
        "subdomain": ctx.child("trainer"),
        # Short: while an old rank ends, the next gang waits.
        "terminationGracePeriodSeconds": 10,
        "containers": [_container(ctx)],
        "volumes": runtime_volumes(ctx, contract_name),
    }


def _container(ctx: Context) -> Manifest:
    spec = ctx.spec.trainer
    return {
        "name": "trainer",
        "image": ctx.trainer_image,
        "imagePullPolicy": ctx.defaults.pull_policy,
        # -g: to the whole process group, for commands that are a shell or torchrun.
        "command": [INIT, "-g", "--", *spec.command],
        "args": list(spec.args),
        "env": _environment(ctx),
        **_ports(ctx),
        "resources": device_resources(ctx, spec.gpus_per_node, cpu="100m", memory="256Mi"),
        "securityContext": fabric_security(ctx),
        "volumeMounts": runtime_mounts(ctx),
    }


def _ports(ctx: Context) -> Manifest:
    ports = [{"name": n, "containerPort": port, "protocol": "TCP"} for n, port in ctx.trainer_metrics_ports.items()]
    return {"ports": ports} if ports else {}


def _environment(ctx: Context) -> list[Manifest]:
    # Kubernetes expands $(...) from variables above: the stored template fits every epoch.
    epoch = [{"name": EPOCH_ENV, "value": "0"}]
    gang = ctx.child("trainer")
    master = {"MASTER_ADDR": f"{gang}-$({EPOCH_ENV})-0.{gang}", "MASTER_PORT": str(TRAINER_PORT)}
    service = {"WEIGHTSYNC_INFERENCE_URL": f"http://{ctx.child('inference')}:{INFERENCE_PORT}"}
    own = env_list({variable.name: variable.value for variable in ctx.spec.trainer.env})
    return [*epoch, *runtime_env(ctx), *env_list(master | service | _mesh(ctx)), *_rank_environment(ctx), *own]


def _mesh(ctx: Context) -> dict[str, str]:
    axes = ctx.spec.trainer.parallelism
    if axes is None:
        return {}
    return {f"WEIGHTSYNC_{name.upper()}": str(size) for name, size in axes.model_dump().items()}


def _rank_environment(ctx: Context) -> list[Manifest]:
    """One process a pod gets its rank from the Job; several get theirs from torchrun, which reads PET_*."""
    nodes, gpus = ctx.spec.trainer.nodes, ctx.spec.trainer.gpus_per_node
    node = [*env_list({"NNODES": str(nodes)}), *field_env(NODE_RANK=_INDEX)]
    if gpus <= 1:
        return [*node, *env_list({"WORLD_SIZE": str(nodes), "LOCAL_RANK": "0"}), *field_env(RANK=_INDEX)]
    torchrun = {
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": str(gpus),
        "PET_MASTER_ADDR": "$(MASTER_ADDR)",
        "PET_MASTER_PORT": "$(MASTER_PORT)",
    }
    return [*node, *env_list(torchrun), *field_env(PET_NODE_RANK=_INDEX)]
