"""What a user asks for: the spec of a WeightSync. The CRD in the chart and docs/api.md are generated from these models.

CEL rules stand where the spec alone decides; what needs the model is judged by the preflight pod. Imports pydantic only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from weightsync_operator.api.fabric import FabricSpec
from weightsync_operator.api.fields import (
    AbsolutePath,
    Argument,
    Arguments,
    DnsSubdomain,
    Image,
    PodOverlay,
    Section,
    later,
    rules,
)
from weightsync_operator.api.rendezvous import ModelExpressSpec, RedisSpec

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

DATA_PARALLEL_FLAGS = "^--?(data-parallel-.*|dp[a-z]?|api-server-count|asc|headless)(=.*)?$"
"""Flags of `vllm serve` that say how data-parallel ranks are started and reached: the operator's, too, where there are any."""

RESERVED_ENV_PATTERN = (
    "^(WEIGHTSYNC_.*|POD_.*|UCX_TLS|RANK|LOCAL_RANK|WORLD_SIZE|NNODES|NODE_RANK|MASTER_ADDR|MASTER_PORT|PET_.*)$"
)
"""Environment that the operator sets and a gang depends on."""


TRAINER_PORT = 29500
"""Where rank 0 of a gang waits for the others."""
_RANKS_A_POD = "(self.trainer.gpusPerNode == 0 ? 1 : self.trainer.gpusPerNode)"


_ONE_SOURCE = "[has(self.path), has(self.hostPath), has(self.persistentVolumeClaim)].exists_one(x, x)"
"""Of a section that says where files are."""


class PersistentVolumeClaimSource(Section):
    """A claim in the resource's namespace."""

    claim_name: DnsSubdomain
    """Name of the claim."""
    sub_path: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^/].*$")] | None = None
    """Folder inside the volume."""


class ModelSpec(Section):
    """The checkpoint (config.json and safetensors files) that trainer and engines start from: version 0."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (_ONE_SOURCE, "exactly one of path, hostPath and persistentVolumeClaim says where the model is"),
        )
    )

    name: (
        Annotated[str, Field(min_length=1, max_length=96, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$")]
        | None
    ) = None
    """Name under which the engines serve it; the resource's name by default."""
    revision: (
        Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$")]
        | None
    ) = later(None)
    """Which state of the files this is, in your own words: a tag, a commit, a date. Another one says that the files were
    replaced: the preflight looks at them again, and trainer and engines start anew from them, at version 0 of a new session."""
    dtype: Literal["bfloat16", "float32"] = later("bfloat16")
    """What engines keep unquantized weights in and compute with. Pushed values are rounded to bf16 in both, but for what the
    model's family keeps in fp32; with float32 they take twice the memory and twice the wire. Another one starts trainer and engines
    anew, at version 0 of a new session."""
    path: AbsolutePath | None = None
    """Folder inside the trainer's and engines' images."""
    host_path: AbsolutePath | None = None
    """Folder on every node; mounted read-only at /models/<last part of the name>."""
    persistent_volume_claim: PersistentVolumeClaimSource | None = None
    """Claim that holds the model; mounted read-only at /models/<last part of the name>."""


class EnvVar(Section):
    """One environment variable; values from Secrets go through podTemplate."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] = ""
    """Its value."""


class TrainerParallelism(Section):
    """Axes of the trainer's device mesh; each rank finds them in WEIGHTSYNC_DP_REPLICATE, _DP_SHARD, _CP and _EP."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("(self.dpShard * self.cp) % self.ep == 0", "ep splits the ranks of dpShard * cp: it must divide them"),
        )
    )

    dp_shard: Annotated[int, Field(ge=1, le=4096)] = 1
    """Ranks that share one copy of the weights (FSDP)."""
    dp_replicate: Annotated[int, Field(ge=1, le=4096)] = 1
    """Copies of the weights (HSDP)."""
    ep: Annotated[int, Field(ge=1, le=4096)] = 1
    """Ranks that share the experts of a layer; they are ranks of dpShard and cp, not more."""
    cp: Annotated[int, Field(ge=1, le=4096)] = 1
    """Ranks that share a sequence (context parallelism)."""

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp


class TrainerSpec(Section):
    """A gang of trainer pods: one Indexed Job an incarnation (epoch); all ranks restart together."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.parallelism) || self.parallelism.dpReplicate * self.parallelism.dpShard * self.parallelism.cp == "
                "self.nodes * (self.gpusPerNode == 0 ? 1 : self.gpusPerNode)",
                "parallelism.dpReplicate * dpShard * cp must be the number of ranks, nodes * gpusPerNode (one a node without GPUs)",
            ),
        )
    )

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
    parallelism: TrainerParallelism | None = later(None)
    """Axes of the trainer's device mesh, given to every rank; the trainer's own affair by default."""
    restarts: Annotated[int, Field(ge=0, le=1000)] = 10
    """Failed incarnations before the resource is Failed; evictions and preemptions do not count."""
    pod_template: PodOverlay = Field(default_factory=dict)
    """A part of a PodTemplateSpec, merged over the rendered one as kubectl merges: lists by their keys, null deletes."""

    @property
    def ranks_a_pod(self) -> int:
        """Processes of one pod: one a GPU, and one without."""
        return max(1, self.gpus_per_node)


class Parallelism(Section):
    """How one engine splits the model."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.ep == 1 || self.ep == self.tp * self.dp",
                "ep shares the experts of a layer over all ranks of the engine: 1, or tp * dp",
            ),
        )
    )

    tp: Annotated[int, Field(ge=1, le=16)] = 1
    """Tensor parallel size."""
    dp: Annotated[int, Field(ge=1, le=16)] = later(1)
    """Data parallel size: ranks that answer different requests behind one endpoint. All tp * dp ranks are one replica, in one pod:
    they commit together. Of a dense model each holds its slice of a whole copy; more replicas do as well, and fail one by one."""
    ep: Annotated[int, Field(ge=1, le=16)] = later(1)
    """Ranks that share the experts of a layer, instead of a slice of each: 1, or tp * dp."""


class InferenceSpec(Section):
    """The fleet of vLLM engines."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.gpus == 0 || self.parallelism.tp * self.parallelism.dp <= self.gpus",
                "parallelism.tp * dp needs that many gpus in the pod: an engine over several nodes is refused in v1alpha1",
            ),
            (
                f"self.parallelism.dp == 1 || self.engineArgs.all(a, !a.matches('{DATA_PARALLEL_FLAGS}'))",
                "parallelism.dp starts all ranks of an engine behind one API server: leave out of engineArgs --data-parallel-*, "
                "--api-server-count and --headless",
            ),
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
    quantization: Literal["none", "fp8"] | None = later(None)
    """What the checkpoint must be: none is plain weights, fp8 a serialized FP8 checkpoint with blocks of 128 x 128, which the
    preflight holds the model to. Plain by default. Online schemes are refused: their weights are in no form that a push could
    write."""
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


class CheckpointSpec(Section):
    """Where the trainer saves checkpoints in bf16 or fp32, as save_pretrained writes them: the last resort of engines.

    When the trainer has ended, some engine is behind, and no engine holds the committed version, one pod pushes the newest of them
    as the next version. It is read-only there; the trainer's own mount is a matter of its podTemplate.
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            (_ONE_SOURCE, "exactly one of path, hostPath and persistentVolumeClaim says where checkpoints are"),
        )
    )

    path: AbsolutePath | None = None
    """Folder inside the pod: in the operator's runtime image, or on a volume of podTemplate."""
    host_path: AbsolutePath | None = None
    """Folder on every node that the pod may run on."""
    persistent_volume_claim: PersistentVolumeClaimSource | None = None
    """Claim that holds the folder."""
    pod_template: PodOverlay = Field(default_factory=dict)
    """A part of a PodTemplateSpec, merged over the pod's as kubectl merges; its container is `restore`. It reads and converts all
    weights in one process: on a large model give it memory."""


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
            (
                "self.commit == 'staged' || !has(self.arenaBudgetGiB)",
                "arenaBudgetGiB needs commit: staged; in place, all weights are converted before the first byte leaves",
            ),
        )
    )

    format: Literal["auto", "bf16", "fp8-128x128", "fp8-128x128-ue8m0"] = "auto"
    """What is quantized on its way; `auto` is what the engines report, and anything else refuses engines that report another. With
    `ue8m0` the scales of FP8 blocks are powers of two, which DeepGEMM wants on Hopper."""
    commit: Literal["inPlace", "staged"] = "inPlace"
    """inPlace: bytes land in the live tensors while the engine is paused. staged: they land in a second buffer while it serves,
    and the pause is a copy."""
    staging: Literal["none", "device", "pinnedHost"] = "none"
    """Where a staged push lands: the engine's device, or host memory of its pod. It takes as much as the weights do, before
    vLLM sizes its KV cache."""
    staging_budget_gib: int | None = Field(default=None, ge=1, le=1024, alias="stagingBudgetGiB")
    """GiB of staging that a rank may take; an engine whose weights need more does not start, and says how much. No bound by
    default."""
    arena_budget_gib: Annotated[int, Field(ge=1, le=1024)] | None = later(None, alias="arenaBudgetGiB")
    """GiB that converted weights may take in a trainer rank, which then sends them through a ring of arenas and keeps none: late
    engines are caught up by their peers. All of them at once by default, kept for late engines."""
    zero_copy: bool = later(False)
    """Read weights that nothing converts (bf16 of a bf16 model) where the trainer's model keeps them, without a copy. No version is
    kept for late engines then, which peers or the next push bring up, and a push returns only when nothing reads the model."""
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
    checkpoint: CheckpointSpec | None = later(None)
    """What engines are restored from when neither a trainer nor a peer holds the committed version: a folder of safetensors
    files, or one of such folders, of which the one with the highest number at the end of its name is taken. Without it they stay
    unready."""


class TelemetrySpec(Section):
    """What trainer ranks show of their pushes besides the ledger (docs/operations.md). A change restarts the pods."""

    metrics_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Each trainer rank serves Prometheus metrics at this port plus its local rank: container ports `metrics`, `metrics-1`, ..."""
    trace_folder: AbsolutePath | None = None
    """Folder in the first trainer pod, on /tmp or a volume of podTemplate, for a trace of each push; the last 32 are kept."""


class WeightSyncSpec(Section):
    """A trainer, a fleet of engines, and how weights get from one to the other."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.transfer.quorum) || self.inference.replicas == 0 || "
                "self.transfer.quorum <= self.inference.replicas",
                "transfer.quorum counts replicas: it needs that many of them",
            ),
            (
                "!has(self.inference.quantization) || self.transfer.format == 'auto' || "
                "(self.inference.quantization == 'fp8') == self.transfer.format.startsWith('fp8')",
                "transfer.format is not what engines of this inference.quantization want: leave it auto",
            ),
            (
                "!has(self.model.dtype) || self.model.dtype == 'bfloat16' || "
                "((!has(self.inference.quantization) || self.inference.quantization == 'none') && "
                "!self.transfer.format.startsWith('fp8'))",
                "engines of FP8 checkpoints compute in bfloat16: leave model.dtype out",
            ),
            (
                "!has(self.telemetry) || !has(self.telemetry.metricsPort) || "
                f"self.telemetry.metricsPort + {_RANKS_A_POD} <= 65536",
                "telemetry.metricsPort plus trainer.gpusPerNode is beyond port 65535: choose a lower one",
            ),
            (
                "!has(self.telemetry) || !has(self.telemetry.metricsPort) || "
                f"self.telemetry.metricsPort > {TRAINER_PORT} || "
                f"self.telemetry.metricsPort + {_RANKS_A_POD} <= {TRAINER_PORT}",
                f"a rank's metrics would be served at {TRAINER_PORT}, where the gang meets (MASTER_PORT): choose another port",
            ),
            (
                "self.deletionPolicy == 'Delete' || has(self.redis.external)",
                "deletionPolicy Retain is for redis.external: a managed Redis goes with its resource",
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
    telemetry: TelemetrySpec | None = later(None)
    """Metrics and traces of the trainer; none by default. Engines have metrics always."""
    suspend: bool = False
    """True takes trainer and engines away; Redis and ModelExpress stay, and the next start is a new epoch."""
    deletion_policy: Literal["Delete", "Retain"] = later("Delete")
    """What becomes of the resource's keys in an external Redis when it is deleted. Delete: the resource stays, with a finalizer,
    until its pods are gone and its keys are deleted, for three minutes at most. Retain: it goes at once and leaves them."""
