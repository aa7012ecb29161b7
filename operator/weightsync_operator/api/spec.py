"""What a user asks for: the spec of a WeightSync. The CRD in the chart and docs/api.md are generated from these models.

CEL rules stand where the spec alone decides; what needs the model is judged by the preflight pod. Imports pydantic only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from weightsync_operator.api.fields import (
    AbsolutePath,
    Argument,
    Arguments,
    DnsSubdomain,
    Image,
    PodOverlay,
    ResourceName,
    Resources,
    Section,
    rules,
)

ENGINE_FLAGS = (
    "model",
    "served-model-name",
    "host",
    "port",
    "dtype",
    "tensor-parallel-size",
    "tp",
    "worker-extension-cls",
)
"""Flags of `vllm serve` that the operator sets, and engineArgs must not."""

RESERVED_ENV_PATTERN = (
    "^(WEIGHTSYNC_.*|POD_.*|UCX_TLS|RANK|LOCAL_RANK|WORLD_SIZE|NNODES|NODE_RANK|MASTER_ADDR|MASTER_PORT|PET_.*)$"
)
"""Environment that the operator sets and a gang depends on."""


class PersistentVolumeClaimSource(Section):
    """A claim in the resource's namespace."""

    claim_name: DnsSubdomain
    """Name of the claim."""
    sub_path: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^/].*$")] | None = None
    """Folder inside the volume that holds config.json."""


class ModelSpec(Section):
    """The checkpoint (config.json and safetensors files) that trainer and engines start from: version 0."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "[has(self.path), has(self.hostPath), has(self.persistentVolumeClaim)].exists_one(x, x)",
                "exactly one of path, hostPath and persistentVolumeClaim says where the model is",
            )
        )
    )

    name: (
        Annotated[str, Field(min_length=1, max_length=96, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$")]
        | None
    ) = None
    """Name under which the engines serve it; the resource's name by default."""
    path: AbsolutePath | None = None
    """Folder inside the trainer's and engines' images."""
    host_path: AbsolutePath | None = None
    """Folder on every node; mounted read-only at /models/<last part of the name>."""
    persistent_volume_claim: PersistentVolumeClaimSource | None = None
    """Claim that holds the model; mounted read-only at /models/<last part of the name>."""


class FabricSpec(Section):
    """What moves the bytes between trainer and engines."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.profile != 'tcp' || !has(self.resourceName)", "profile tcp uses no device: leave resourceName out"),
        )
    )

    profile: Literal["tcp", "emulated", "hca-shared"] = "tcp"
    """tcp: no device; emulated: the lab's device plug-in, bytes over tcp; hca-shared: RDMA shared device plug-in."""
    resource_name: ResourceName | None = None
    """Extended resource of the RDMA device; the profile's own by default."""
    count: Annotated[int, Field(ge=1, le=16)] = 1
    """RDMA devices a pod."""
    ucx: Annotated[
        dict[str, Annotated[str, Field(max_length=256)]],
        Field(
            max_length=32,
            json_schema_extra=rules(("self.all(k, k.matches('^UCX_[A-Z0-9_]+$'))", "ucx takes variables named UCX_*")),
        ),
    ] = Field(default_factory=dict)
    """UCX variables for trainer and engines, over the profile's."""


class RedisSpec(Section):
    """The managed Redis that holds the ledger of versions."""

    image: Image | None = None
    """The operator's default by default."""
    resources: Resources = Resources()
    """Requests and limits of the Redis container."""


class ModelExpressSpec(Section):
    """The managed ModelExpress server, by which trainer and engines find each other."""

    image: Image | None = None
    """The operator's default by default."""
    resources: Resources = Resources()
    """Requests and limits of the server's container."""


class EnvVar(Section):
    """One environment variable; values from Secrets go through podTemplate."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] = ""
    """Its value."""


class TrainerSpec(Section):
    """A gang of trainer pods: one Indexed Job an incarnation (epoch); all ranks restart together."""

    image: Image | None = None
    """The operator's runtime image by default; any other must hold the weightsync package and tini."""
    command: Annotated[tuple[Argument, ...], Field(min_length=1, max_length=32)]
    """What every pod runs, under an init that forwards SIGTERM."""
    args: Arguments = ()
    """Arguments of the command."""
    env: Annotated[
        tuple[EnvVar, ...],
        Field(
            max_length=64,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                **rules(
                    (
                        f"self.all(e, !e.name.matches('{RESERVED_ENV_PATTERN}'))",
                        "the operator sets these variables itself",
                    )
                ),
            },
        ),
    ] = ()
    """More environment."""
    nodes: Annotated[int, Field(ge=1, le=256)] = 1
    """Pods of the gang."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs a pod. With more than one, PET_* variables are set and the command is torchrun's."""
    restarts: Annotated[int, Field(ge=0, le=1000)] = 10
    """Failed incarnations before the resource is Failed; evictions and preemptions do not count."""
    pod_template: PodOverlay = Field(default_factory=dict)
    """A part of a PodTemplateSpec, merged over the rendered one as kubectl merges: lists by their keys, null deletes."""


class Parallelism(Section):
    """How one engine splits the model."""

    tp: Annotated[int, Field(ge=1, le=16)] = 1
    """Tensor parallel size."""


class InferenceSpec(Section):
    """The fleet of vLLM engines."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.gpus == 0 || self.parallelism.tp <= self.gpus", "parallelism.tp needs that many gpus in the pod"),
        )
    )

    image: Image | None = None
    """The operator's runtime image by default; any other must hold vLLM 0.32 and the weightsync package."""
    replicas: Annotated[int, Field(ge=0, le=500)] = 1
    """Engines; `kubectl scale` changes it."""
    gpus: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs an engine."""
    parallelism: Parallelism = Parallelism()
    """How one engine splits the model."""
    engine_args: Annotated[
        tuple[Annotated[str, Field(max_length=1024)], ...],
        Field(
            max_length=64,
            json_schema_extra=rules(
                (
                    f"self.all(a, !a.matches('^--({'|'.join(ENGINE_FLAGS)})(=.*)?$'))",
                    "engineArgs repeats a flag that the operator sets: "
                    + ", ".join(f"--{flag}" for flag in ENGINE_FLAGS),
                )
            ),
        ),
    ] = ()
    """More arguments of `vllm serve`, one string an argument."""
    max_unavailable: Annotated[int, Field(ge=1, le=500)] = 1
    """Engines that a rollout or a drain may take away at once."""
    pod_template: PodOverlay = Field(default_factory=dict)
    """A part of a PodTemplateSpec, merged over the rendered one as kubectl merges: lists by their keys, null deletes."""


class TransferSpec(Section):
    """How a push is made and ended."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.commit != 'staged' || self.staging != 'none'", "commit staged needs staging: device or pinnedHost"),
            ("self.commit == 'staged' || self.staging == 'none'", "commit inPlace stages nothing: leave staging out"),
            (
                "self.staging != 'none' || !has(self.stagingBudgetGiB)",
                "stagingBudgetGiB bounds a staging buffer, and staging is none",
            ),
        )
    )

    format: Literal["auto", "bf16", "fp8-128x128", "fp8-128x128-ue8m0"] = "auto"
    """What travels; `auto` is what the engines report, and anything else refuses engines that report another. With `ue8m0` the
    scales of FP8 blocks are powers of two, which DeepGEMM wants on Hopper."""
    commit: Literal["inPlace", "staged"] = "inPlace"
    """inPlace: bytes land in the live tensors while the engine is paused. staged: they land in a second buffer while it serves,
    and the pause is a copy."""
    staging: Literal["none", "device", "pinnedHost"] = "none"
    """Where a staged push lands: the engine's device, or host memory of its pod. It takes as much as the weights do, before
    vLLM sizes its KV cache."""
    staging_budget_gib: int | None = Field(default=None, ge=1, le=1024, alias="stagingBudgetGiB")
    """GiB of staging that a rank may take; an engine whose weights need more does not start, and says how much. No bound by
    default."""
    quorum: Annotated[int, Field(ge=1, le=500)] | None = None
    """Replicas that must hold a version for it to be committed; the others are fenced and caught up later. All live ones by
    default."""
    verify: Literal["full", "sampled", "off"] = "full"
    """What engines measure before a version may be served: all bytes, those of some tensors (others each push), or their number
    only."""
    prefix_cache: Literal["reset", "keep"] = "reset"
    """What a commit does to an engine's prefix cache: the old policy's entries are dropped, or answer for the new one."""
    pause_mode: Literal["abort", "wait", "keep"] = "wait"
    """What happens to running requests: aborted, finished first, or kept over the switch."""
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 120
    """One deadline for a whole push."""
    max_version_skew: Annotated[int, Field(ge=0, le=1000)] = 0
    """Versions that an engine may be behind and still serve."""


class WeightSyncSpec(Section):
    """A trainer, a fleet of engines, and how weights get from one to the other."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.transfer.quorum) || self.inference.replicas == 0 || "
                "self.transfer.quorum <= self.inference.replicas",
                "transfer.quorum counts replicas: it needs that many of them",
            ),
        )
    )

    model: ModelSpec
    """The checkpoint to start from."""
    fabric: FabricSpec = FabricSpec()
    """What moves the bytes."""
    redis: RedisSpec = RedisSpec()
    """The ledger."""
    model_express: ModelExpressSpec = ModelExpressSpec()
    """The rendezvous."""
    trainer: TrainerSpec
    """The gang that trains and pushes."""
    inference: InferenceSpec = InferenceSpec()
    """The fleet that serves."""
    transfer: TransferSpec = TransferSpec()
    """The push."""
    suspend: bool = False
    """True takes trainer and engines away; Redis and ModelExpress stay, and the next start is a new epoch."""
