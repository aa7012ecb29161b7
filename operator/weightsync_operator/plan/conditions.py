"""The conditions of a WeightSync: one function a condition, each of the same facts. Pure."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

from weightsync.wire import Decision, PushSummary
from weightsync_operator.api.names import Component, Condition, Reason, TrainerState
from weightsync_operator.api.status import ConditionStatus, TrainerStatus, WeightSyncStatus
from weightsync_operator.plan.admit import Admission
from weightsync_operator.plan.fleet import Fleet, named
from weightsync_operator.plan.gang import LATCHED
from weightsync_operator.plan.observed import Seen, has_ended, timestamp
from weightsync_operator.plan.restore import Restore
from weightsync_operator.plan.rollout import Rollout

_HELPERS = frozenset({"self", "cuda_copy", "cuda_ipc"})
"""Transports that stage bytes on the way to the wire and may stand beside any fabric."""


class Door(enum.Enum):
    """Who may call ModelExpress."""

    MEMBERS = enum.auto()
    """Its resource's members, by their tokens."""
    MEMBERS_LATER = enum.auto()
    """The same, once the children are rendered anew."""
    OPEN = enum.auto()
    EXTERNAL = enum.auto()
    """Somebody else's server: not known here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What conditions are made of."""

    seen: Seen
    admission: Admission
    in_force: bool
    """False until the first spec was admitted."""
    gang: TrainerStatus
    fleet: Fleet
    rollout: Rollout
    restore: Restore
    suspend: bool
    transports: tuple[str, ...]
    update_pending: bool
    door: Door
    missing_secret: str
    """Which Secret of Redis (its password, its TLS) cannot be read, and why; empty when all were."""

    @property
    def last_push(self) -> PushSummary | None:
        return None if self.seen.ledger is None else self.seen.ledger.last_push

    @property
    def aborted_push(self) -> PushSummary | None:
        push = self.last_push
        return push if push is not None and push.outcome == Decision.ABORT else None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Status, reason and message of one condition. `status` None is Unknown."""

    status: bool | None
    reason: Reason
    message: str = ""


def conditions(facts: Facts, before: Iterable[ConditionStatus], generation: int) -> tuple[ConditionStatus, ...]:
    """All conditions; times move only where the status does, and conditions of others are kept."""
    known = {condition.type: condition for condition in before}
    verdicts = {
        Condition.SPEC_VALID: _spec_valid(facts),
        Condition.AVAILABLE: _available(facts),
        Condition.PROGRESSING: _progressing(facts),
        Condition.DEGRADED: _degraded(facts),
        Condition.SYNCED: _synced(facts),
        Condition.TRANSPORT_VERIFIED: _transport_verified(facts),
        Condition.SECURITY_ENFORCED: _security_enforced(facts),
        Condition.LEDGER_REACHABLE: _ledger_reachable(facts),
        Condition.UPDATE_PENDING: _update_pending(facts),
        Condition.SUSPENDED: _suspended(facts),
        Condition.COMPLETE: _complete(facts),
        Condition.FAILED: _failed(facts),
    }
    ours = tuple(_dated(type_, v, known.get(type_), generation, facts.seen.now) for type_, v in verdicts.items())
    return (*ours, *(condition for type_, condition in known.items() if type_ not in verdicts))


def with_verdict(
    before: WeightSyncStatus, type_: Condition, verdict: Verdict, *, generation: int, now: float
) -> WeightSyncStatus:
    """The status with one condition replaced."""
    known = next((condition for condition in before.conditions if condition.type == type_), None)
    ours = _dated(type_, verdict, known, generation, now)
    others = tuple(condition for condition in before.conditions if condition.type != type_)
    return before.model_copy(update={"observed_generation": generation, "conditions": (ours, *others)})


def _dated(
    type_: str, verdict: Verdict, before: ConditionStatus | None, generation: int, now: float
) -> ConditionStatus:
    status = "Unknown" if verdict.status is None else str(verdict.status)
    unchanged = before is not None and before.status == status
    return ConditionStatus(
        type=type_,
        status=status,
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before is not None and unchanged else timestamp(now),
        reason=verdict.reason.value,
        message=verdict.message[:1024],
    )


def _spec_valid(facts: Facts) -> Verdict:
    admission = facts.admission
    if admission.admitted:
        return Verdict(True, Reason.VALID)
    return Verdict(False if admission.settled else None, admission.reason, admission.message)


def _available(facts: Facts) -> Verdict:
    fleet = facts.fleet
    if fleet.ready > 0:
        return Verdict(True, Reason.ENGINES_READY, f"{fleet.ready} of {fleet.wanted} engines ready")
    if facts.suspend:
        return Verdict(False, Reason.SUSPENDED)
    return Verdict(False, Reason.NO_ENGINE_READY, f"0 of {fleet.wanted} engines ready")


def _progressing(facts: Facts) -> Verdict:
    fleet, gang, rollout = facts.fleet, facts.gang, facts.rollout
    if not facts.admission.settled:
        return Verdict(True, Reason.STARTING, facts.admission.message)
    if not facts.in_force:
        return Verdict(False, facts.admission.reason, "nothing is made before the spec is valid")
    if rollout.blocked is not None:
        return Verdict(
            True,
            rollout.blocked,
            f"neither a trainer nor a peer would be left to bring successors up to date of {named(rollout.outdated)}",
        )
    if rollout.outdated:
        return Verdict(True, Reason.ROLLING_OUT, f"still to be replaced: {named(rollout.outdated)}")
    if gang.state in (TrainerState.WAITING, TrainerState.STARTING, TrainerState.STOPPING):
        return Verdict(True, Reason.TRAINER_RESTARTING if gang.restarts else Reason.STARTING, _gang_message(facts))
    if fleet.ready < fleet.wanted:
        return Verdict(True, Reason.STARTING, f"{fleet.ready} of {fleet.wanted} engines ready")
    return Verdict(False, Reason.STABLE)


def _gang_message(facts: Facts) -> str:
    """Where the gang stands, and whose end it waits for: a pod on a lost node can hold up the next epoch for long."""
    gang = facts.gang
    words = f"trainer is {gang.state.value}" + (f": {gang.reason}" if gang.reason else "")
    restoring = [pod for pod in facts.seen.of_kind("Pod", Component.RESTORE) if not has_ended(pod)]
    pods = [*facts.seen.of_kind("Pod", Component.TRAINER), *restoring]
    left = tuple(pod["metadata"]["name"] for pod in pods)
    return f"{words}; waits for {named(left)} to end" if gang.state is TrainerState.STOPPING and left else words


def _degraded(facts: Facts) -> Verdict:
    seen, gang, dirty = facts.seen, facts.gang, facts.fleet.dirty
    if seen.taken:
        taken = tuple(f"{kind} {name}" for kind, name in sorted(seen.taken))
        return Verdict(True, Reason.NAME_TAKEN, f"belongs to somebody else and is left alone: {named(taken)}")
    if seen.refused:
        return Verdict(True, Reason.APPLY_REFUSED, seen.refused)
    if gang.state is TrainerState.FAILED:
        return Verdict(True, Reason.RESTART_BUDGET_SPENT, gang.reason)
    if dirty:
        return Verdict(
            True,
            Reason.ENGINES_DIRTY,
            f"hold torn weights and serve nothing until a push or a peer repairs them: {named(dirty)}",
        )
    if facts.restore.words:
        reason = Reason.RESTORING if facts.restore.under_way else Reason.RESTORE_FAILED
        return Verdict(True, reason, f"no engine holds version {facts.fleet.committed}; {facts.restore.words}")
    if facts.aborted_push is not None:
        return Verdict(True, Reason.PUSH_ABORTED, _abort_message(facts.aborted_push))
    if gang.restarts and gang.state is not TrainerState.RUNNING and gang.state is not TrainerState.COMPLETE:
        return Verdict(True, Reason.TRAINER_RESTARTING, gang.reason)
    return Verdict(False, Reason.HEALTHY)


def _synced(facts: Facts) -> Verdict:
    fleet, ledger = facts.fleet, facts.seen.ledger
    if facts.suspend:
        return Verdict(None, Reason.SUSPENDED)
    if not facts.in_force:
        return Verdict(None, Reason.NOT_STARTED)
    if ledger is None:
        return Verdict(None, Reason.NOT_READ_YET, "the ledger was not read yet")
    if ledger.error:
        return Verdict(None, Reason.UNREACHABLE, "the ledger cannot be read; engines go on with what they hold")
    if facts.aborted_push is not None and not facts.restore.words:
        return Verdict(False, Reason.PUSH_ABORTED, _abort_message(facts.aborted_push))
    if not fleet.laggards:
        return Verdict(True, Reason.IN_SYNC, f"{len(fleet.replicas)} engines hold version {fleet.committed}")
    behind = len(fleet.replicas) - fleet.numbers().current + max(0, fleet.wanted - len(fleet.replicas))
    message = f"{behind} of {fleet.wanted} engines do not hold version {fleet.committed}: {named(fleet.laggards)}"
    if facts.gang.state in LATCHED and fleet.committed > 0:
        ended = f"{message}; the trainer is {facts.gang.state.value}"
        if not fleet.lenders:
            words = f"{ended} and no one else has it" + (f"; {facts.restore.words}" if facts.restore.words else "")
            return Verdict(False, Reason.RESTORING if facts.restore.under_way else Reason.NO_SOURCE, words)
        return Verdict(False, Reason.BEHIND, f"{ended}, peers that have it: {named(tuple(sorted(fleet.lenders)))}")
    return Verdict(False, Reason.BEHIND, message)


def _abort_message(push: PushSummary) -> str:
    return f"version {push.version} (epoch {push.epoch}) was aborted: {push.reason or 'no reason given'}"


def _transport_verified(facts: Facts) -> Verdict:
    push = facts.last_push
    if push is None:
        return Verdict(None, Reason.NO_PUSH_YET, f"expected: {', '.join(facts.transports)}")
    if not push.transports:
        return Verdict(None, Reason.NOT_REPORTED, f"UCX_TLS leaves a choice; expected: {', '.join(facts.transports)}")
    used = set(push.transports) - _HELPERS
    unexpected = sorted(used - set(facts.transports))
    if unexpected or not used:
        message = f"used {', '.join(sorted(push.transports))}, expected {', '.join(facts.transports)}"
        return Verdict(False, Reason.UNEXPECTED_TRANSPORT, message)
    return Verdict(True, Reason.EXPECTED_TRANSPORT, f"used {', '.join(sorted(used))}")


def _security_enforced(facts: Facts) -> Verdict:
    open_door = "ModelExpress admits every pod that reaches it"
    match facts.door:
        case Door.MEMBERS:
            return Verdict(True, Reason.ENFORCED, "ModelExpress admits the account of this resource's pods alone")
        case Door.MEMBERS_LATER if not facts.in_force:
            return Verdict(None, Reason.NOT_STARTED)
        case Door.MEMBERS_LATER:
            words = (
                "it was made before this operator could let it check tokens; the next change of the spec takes that in"
            )
            return Verdict(False, Reason.NOT_ENFORCED, f"{open_door}: {words}")
        case Door.EXTERNAL:
            return Verdict(False, Reason.NOT_ENFORCED, "the external ModelExpress decides itself whom it admits")
    if facts.seen.cluster_wide:
        words = "the chart was installed with tokenReview.create false, so that it may not check service-account tokens"
        return Verdict(False, Reason.NOT_ENFORCED, f"{open_door}: {words}")
    return Verdict(
        False,
        Reason.NAMESPACED_OPERATOR,
        f"{open_door}: checking service-account tokens takes a ClusterRoleBinding to system:auth-delegator, and this operator"
        " has a Role only: an administrator makes one and sets tokenReview.granted (docs/security.md); fabric auto, which reads"
        " nodes, is not available either",
    )


def _ledger_reachable(facts: Facts) -> Verdict:
    ledger = facts.seen.ledger
    if ledger is None:
        return (
            Verdict(False, Reason.SECRET_MISSING, facts.missing_secret)
            if facts.missing_secret
            else Verdict(None, Reason.NOT_READ_YET)
        )
    if ledger.error:
        return Verdict(False, Reason.UNREACHABLE, ledger.error)
    return Verdict(True, Reason.REACHABLE)


def _update_pending(facts: Facts) -> Verdict:
    if facts.update_pending:
        message = "this operator renders the children differently; that waits for the next change of the spec"
        return Verdict(True, Reason.OPERATOR_CHANGED, message)
    return Verdict(False, Reason.UP_TO_DATE)


def _suspended(facts: Facts) -> Verdict:
    if not facts.suspend:
        return Verdict(False, Reason.RUNNING)
    writers = [pod for role in (Component.TRAINER, Component.RESTORE) for pod in facts.seen.of_kind("Pod", role)]
    unfinished = [pod for pod in writers if not has_ended(pod)]
    left = tuple(pod["metadata"]["name"] for pod in [*unfinished, *facts.seen.of_kind("Pod", Component.INFERENCE)])
    if left:
        return Verdict(False, Reason.SUSPENDING, f"waits for {named(left)} to end")
    return Verdict(True, Reason.SUSPENDED, "no trainer, no engine; set spec.suspend to false to go on")


def _complete(facts: Facts) -> Verdict:
    if facts.gang.state is TrainerState.COMPLETE:
        return Verdict(True, Reason.TRAINER_SUCCEEDED, f"epoch {facts.gang.epoch} ended with success")
    return Verdict(False, _unfinished(facts))


def _failed(facts: Facts) -> Verdict:
    if facts.gang.state is TrainerState.FAILED:
        return Verdict(True, Reason.RESTART_BUDGET_SPENT, facts.gang.reason)
    return Verdict(False, _unfinished(facts))


def _unfinished(facts: Facts) -> Reason:
    return Reason.RUNNING if facts.gang.state is TrainerState.RUNNING else Reason.NOT_STARTED
