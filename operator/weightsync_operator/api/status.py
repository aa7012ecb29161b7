"""What the operator shows: the status of a WeightSync. Imports pydantic only."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from weightsync_operator.api.fields import Section as SpecSection
from weightsync_operator.api.names import TrainerState

REPLICAS_SHOWN = 32
"""Length of status.replicas: it must not grow with the fleet (500 replicas are 77 KB)."""


class Section(SpecSection):
    """A part of the status; what a newer operator wrote beside it is ignored, so that going back loses no epoch."""

    model_config = ConfigDict(extra="ignore")


Text = Annotated[str, Field(max_length=1024)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class ConditionStatus(Section):
    """One condition, as everywhere in Kubernetes."""

    type: Annotated[str, Field(max_length=64)]
    """See `Condition`."""
    status: Annotated[str, Field(max_length=8, json_schema_extra={"enum": ["True", "False", "Unknown"]})]
    """True, False or Unknown."""
    observed_generation: Count = 0
    """Generation of the spec that it speaks about."""
    last_transition_time: Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})]
    """When `status` changed last."""
    reason: Annotated[str, Field(max_length=64)]
    """One word for programs."""
    message: Text = ""
    """One line for people: what, why, and what to do."""


class VersionStatus(Section):
    """Weight versions as the ledger counts them."""

    published: Count = 0
    """The last version that was tried."""
    committed: Count = 0
    """The version in force; 0 is spec.model as loaded. It never goes back within a session, whatever a ledger has lost."""
    session: Annotated[str, Field(max_length=63)] = ""
    """Of the ledger that counts them: another model, format or parallelism begins at 0."""


class LastPush(Section):
    """The newest push that ended."""

    version: Count = 0
    """The version that it carried."""
    epoch: Count = 0
    """The trainer's incarnation."""
    step: int = 0
    """The trainer's own label."""
    source: Annotated[str, Field(max_length=63)] = ""
    """The engine from whose memory another one was repaired; empty when a trainer or a checkpoint was pushed."""
    outcome: Annotated[str, Field(max_length=16)] = ""
    """COMMIT or ABORT."""
    reason: Text = ""
    """Why it was aborted, and by whom."""
    seconds: float = 0.0
    """From begin to decision."""
    bytes: Count = 0
    """Payload, counted at the receivers."""
    gbps: float = Field(default=0.0, validation_alias="GBps", serialization_alias="GBps")
    """1e9 bytes a second on the wire, three digits."""
    throughput: Annotated[str, Field(max_length=32)] = ""
    """GBps with its unit, for the column of kubectl."""
    pause_seconds: float = 0.0
    """The longest pause of any engine."""
    digest: Annotated[str, Field(max_length=64)] = ""
    """Of all targets of one engine, as measured in live memory."""
    digest_ok: bool = False
    """True when every engine measured it before it served."""
    phases: Annotated[dict[str, float], Field(max_length=32)] = Field(default_factory=dict)
    """Seconds by phase."""
    finished_at: Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})] | None = None
    """When it ended, by the ledger's clock."""


class InferenceStatus(Section):
    """The fleet in numbers."""

    replicas: Count = 0
    """Pods that exist (the scale subresource reads it)."""
    ready: Count = 0
    """Pods that answer requests."""
    current: Count = 0
    """Pods that hold the committed version."""


class ReplicaView(Section):
    """One engine."""

    name: Annotated[str, Field(max_length=253)]
    """Its pod."""
    version: int | None = None
    """Version of its weights; absent until it reported one."""
    state: Annotated[str, Field(max_length=16)]
    """CLEAN, OPEN, VERIFIED or DIRTY; STARTING before the first report; ENDING once it has left; LOST when its heartbeat ended."""
    reason: Text = ""
    """Why it does not serve."""


class TrainerStatus(Section):
    """The gang."""

    epoch: Count = 0
    """The last incarnation; noted here before its Job exists."""
    state: TrainerState = TrainerState.WAITING
    """See `TrainerState`."""
    restarts: Count = 0
    """Failed incarnations of this spec.trainer."""
    spec_hash: Annotated[str, Field(max_length=16)] = ""
    """The spec.trainer that restarts, Complete and Failed belong to."""
    failed_at: Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})] | None = None
    """When an incarnation failed last; the next one waits a little longer each time."""
    reason: Text = ""
    """Why it is in this state."""


class FabricStatus(Section):
    """The fabric in use."""

    profile: Annotated[str, Field(max_length=32)] = ""
    """The profile in force."""
    reason: Text = ""
    """Why this one."""


class PreflightError(Section):
    """One thing that is wrong with the spec or the model."""

    field: Annotated[str, Field(max_length=256)]
    """Path of the field."""
    message: Text
    """What is wrong and what would be right."""


class PreflightStatus(Section):
    """The preflight's last verdict; it is asked again only when what it judged has changed."""

    hash: Annotated[str, Field(max_length=16)] = ""
    """Hash of model, sizes and image."""
    ok: bool = False
    """True when nothing is wrong."""
    errors: Annotated[tuple[PreflightError, ...], Field(max_length=16)] = ()
    """What is wrong."""


class WeightSyncStatus(Section):
    """What is."""

    observed_generation: Count = 0
    """Generation of the spec that this status speaks about."""
    revision: Annotated[str, Field(max_length=16)] = ""
    """Hash of the spec whose children are in force (kept in the ControllerRevision <name>-<revision>)."""
    model: Annotated[str, Field(max_length=96)] = ""
    """Name of the served model."""
    conditions: Annotated[
        tuple[ConditionStatus, ...],
        Field(
            max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = ()
    """See `Condition`."""
    version: VersionStatus = VersionStatus()
    """Weight versions."""
    last_push: LastPush | None = None
    """The newest push that ended."""
    inference: InferenceStatus = InferenceStatus()
    """The fleet in numbers."""
    selector: Annotated[str, Field(max_length=512)] = ""
    """Label selector of the engines (the scale subresource reads it)."""
    replicas: Annotated[tuple[ReplicaView, ...], Field(max_length=REPLICAS_SHOWN)] = ()
    """At most 32 engines, laggards first."""
    trainer: TrainerStatus = TrainerStatus()
    """The gang."""
    fabric: FabricStatus = FabricStatus()
    """The fabric in use."""
    preflight: PreflightStatus | None = None
    """The preflight's last verdict."""
