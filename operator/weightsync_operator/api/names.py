"""Every name that users and other programs may rely on: group, labels, annotations, conditions and reasons.

Imports the standard library only.
"""

from __future__ import annotations

import enum

GROUP = "weightsync.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "WeightSync"
PLURAL = "weightsyncs"

FINALIZER = f"{GROUP}/ledger"
"""Holds a deleted resource until its keys are gone from an external Redis; no other resource has it."""

FIELD_MANAGER = "weightsync"
"""Owner of every field that the operator applies; other managers' fields are left alone."""

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_INSTANCE = "app.kubernetes.io/instance"
LABEL_COMPONENT = "app.kubernetes.io/component"
MANAGED_BY = "weightsync"

LABEL_EPOCH = f"{GROUP}/epoch"
"""Incarnation of the trainer, on its Job and pods."""
LABEL_LOST_VERSION = f"{GROUP}/lost-version"
"""On a Job that pushes a checkpoint: the version that no engine held any more."""
LABEL_SESSION = f"{GROUP}/session"
"""Ledger session of a pod: pods of two sessions never exchange weights."""
ANNOTATION_RENDER = f"{GROUP}/render"
"""Hash of what the operator last applied; another hash means that the child must be applied again."""
ANNOTATION_AUTH = f"{GROUP}/auth"
"""Fingerprint of the passwords that a pod was started with."""
ANNOTATION_CERTIFICATE = f"{GROUP}/certificate"
"""Fingerprint of the certificate that a managed Redis was started with."""
ANNOTATION_TEMPLATE = f"{GROUP}/template"
"""Hash of the pod template of a trainer's Job, by which a changed spec is told from a foreign edit."""
ANNOTATION_FABRIC = f"{GROUP}/fabric"
"""On the engines' StatefulSet: why `auto` chose the fabric in force."""
LABEL_EMULATED_DEVICES = f"{GROUP}/emulated-devices"
"""On a node: its GPUs and RDMA devices are the lab's, however they are called."""

RESERVED_LABEL_PREFIXES = ("app.kubernetes.io/", f"{GROUP}/")


class Component(enum.StrEnum):
    """Value of the component label."""

    AUTH = "auth"
    CONTRACT = "contract"
    PREFLIGHT = "preflight"
    REDIS = "redis"
    MODEL_EXPRESS = "modelexpress"
    TRAINER = "trainer"
    INFERENCE = "inference"
    RESTORE = "restore"


SESSION_ROLES = (Component.TRAINER, Component.INFERENCE, Component.RESTORE)
"""Roles whose pods are of one session: they use its ledger, and move its weights."""


class Condition(enum.StrEnum):
    """Condition types of a WeightSync."""

    SPEC_VALID = "SpecValid"
    """The spec can be rendered, the API server takes every child, and the preflight of the model passed."""
    AVAILABLE = "Available"
    """At least one engine answers requests."""
    PROGRESSING = "Progressing"
    """Something is still being created, replaced or waited for."""
    DEGRADED = "Degraded"
    """Something that ran has broken, and the message says what."""
    SYNCED = "Synced"
    """Every wanted engine serves the committed version."""
    TRANSPORT_VERIFIED = "TransportVerified"
    """The last push used the transports that the fabric profile expects, and no other."""
    SECURITY_ENFORCED = "SecurityEnforced"
    """Only members of this resource can use its ModelExpress; the message says what stands in the way."""
    LEDGER_REACHABLE = "LedgerReachable"
    """The operator can read the ledger; the figures in the status are current only then."""
    UPDATE_PENDING = "UpdatePending"
    """This operator would render the children differently; that waits for the next change of the spec."""
    SUSPENDED = "Suspended"
    """spec.suspend is in force: no trainer, no engine."""
    COMPLETE = "Complete"
    """The trainer ended with success; it never runs again for the same spec.trainer."""
    FAILED = "Failed"
    """The trainer used up its restart budget; a change of spec.trainer starts it again."""


class Reason(enum.StrEnum):
    """Reasons of conditions, in the order of `Condition`."""

    VALID = "Valid"
    SPEC_INVALID = "SpecInvalid"
    PREFLIGHT_RUNNING = "PreflightRunning"
    PREFLIGHT_FAILED = "PreflightFailed"
    MODEL_MISSING = "ModelMissing"
    IMAGE_MISSING = "ImageMissing"
    SECRET_MISSING = "SecretMissing"
    ENGINES_READY = "EnginesReady"
    NO_ENGINE_READY = "NoEngineReady"
    STABLE = "Stable"
    STARTING = "Starting"
    RELEASING = "Releasing"
    ROLLING_OUT = "RollingOut"
    ROLLOUT_WAITS_FOR_SOURCE = "RolloutWaitsForSource"
    TRAINER_RESTARTING = "TrainerRestarting"
    HEALTHY = "Healthy"
    NAME_TAKEN = "NameTaken"
    APPLY_REFUSED = "ApplyRefused"
    ENGINES_DIRTY = "EnginesDirty"
    IN_SYNC = "InSync"
    BEHIND = "Behind"
    PUSH_ABORTED = "PushAborted"
    NO_SOURCE = "NoSource"
    RESTORING = "Restoring"
    RESTORE_FAILED = "RestoreFailed"
    EXPECTED_TRANSPORT = "ExpectedTransport"
    UNEXPECTED_TRANSPORT = "UnexpectedTransport"
    NO_PUSH_YET = "NoPushYet"
    NOT_REPORTED = "NotReported"
    ENFORCED = "Enforced"
    NOT_ENFORCED = "NotEnforced"
    NAMESPACED_OPERATOR = "NamespacedOperator"
    REACHABLE = "Reachable"
    UNREACHABLE = "Unreachable"
    NOT_READ_YET = "NotReadYet"
    UP_TO_DATE = "UpToDate"
    OPERATOR_CHANGED = "OperatorChanged"
    SUSPENDED = "Suspended"
    SUSPENDING = "Suspending"
    RUNNING = "Running"
    NOT_STARTED = "NotStarted"
    TRAINER_SUCCEEDED = "TrainerSucceeded"
    RESTART_BUDGET_SPENT = "RestartBudgetSpent"


class TrainerState(enum.StrEnum):
    """status.trainer.state."""

    WAITING = "Waiting"
    """For Redis and ModelExpress, or for the pause between two restarts."""
    STARTING = "Starting"
    """The epoch is noted; its Job is about to be created."""
    RUNNING = "Running"
    STOPPING = "Stopping"
    """The Job is being deleted; the next epoch waits until all its pods are gone."""
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
