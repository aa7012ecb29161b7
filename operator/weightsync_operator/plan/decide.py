"""The one decision: from what is wanted and what was seen to actions, status and the time of the next look. Pure."""

from __future__ import annotations

import dataclasses

from weightsync.wire import PushSummary
from weightsync_operator.api.names import Component, Reason, TrainerState
from weightsync_operator.api.status import FabricStatus, LastPush, TrainerStatus, VersionStatus, WeightSyncStatus
from weightsync_operator.plan import prune
from weightsync_operator.plan.actions import Action, Apply
from weightsync_operator.plan.admit import Admission, step_admission
from weightsync_operator.plan.build.context import Context, Manifest, selector_labels
from weightsync_operator.plan.build.redis import certificate_of
from weightsync_operator.plan.conditions import Door, Facts, conditions
from weightsync_operator.plan.drift import needs_apply
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.fleet import observe_fleet
from weightsync_operator.plan.gang import GangStep, GangWish, step_gang
from weightsync_operator.plan.observed import Seen, is_available, seconds, timestamp
from weightsync_operator.plan.render import Render, base_at, engines_at, preflight_pod, revision_object, stamped
from weightsync_operator.plan.restore import Restore, RestoreWish, step_restore
from weightsync_operator.plan.rollout import Rollout, step_rollout
from weightsync_operator.plan.unread import keep_unread

NAME_TAKEN_LOOK_AGAIN_S = 5.0
SECRET_LOOK_AGAIN_S = 15.0
"""Secrets are not watched."""
EVICTION_LOOK_AGAIN_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the spec asks for, as this operator renders it, and what is in force."""

    ctx: Context
    secret: Manifest | None
    """None while `missing_secret`: what was applied last is left as it is."""
    certificate: str = ""
    """Fingerprint of the certificate in the Secret that the spec names for the managed Redis; empty for none, or while unread."""
    revision: str
    """Hash of the spec as it stands."""
    fresh: Render | SpecError
    """The spec as this operator renders it; an error if it cannot be rendered."""
    stored: Render | None = None
    """The same spec as it was rendered when it was in force before: going back to it restarts nothing needlessly."""
    in_force: Render | None = None
    """The render that was admitted last, from its ControllerRevision."""
    in_force_revision: str = ""
    missing_secret: SpecError | None = None
    """Which Secret of Redis (its password, its TLS) cannot be read, and why.

    Without it nothing new comes into force; what is, is kept up.
    """

    @property
    def rendered(self) -> Render | SpecError:
        """What would come into force."""
        return self.fresh if self.stored is None else self.stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What to do, in order, and what to show."""

    actions: tuple[Action, ...]
    status: WeightSyncStatus
    look_again_s: float | None = None


def decide(wanted: Wanted, seen: Seen) -> Step:
    """One pass: admit the spec as it stands, then keep up whatever is in force."""
    before = WeightSyncStatus.model_validate(seen.resource.get("status") or {})
    admission = _admit(wanted, before, seen)
    if admission.admitted and wanted.in_force_revision != wanted.revision:
        return _put_in_force(wanted, before, seen, admission)
    gang, rollout, restore, actions = GangStep(status=before.trainer), Rollout(), Restore(), ()
    if wanted.in_force is not None:
        gang = _step_gang(wanted, wanted.in_force, before.trainer, seen)
        rollout = _step_rollout(wanted, wanted.in_force, gang.status, seen)
        restore = _step_restore(wanted, wanted.in_force, before, gang.status, seen)
        actions = (*_upkeep(wanted, wanted.in_force, seen), *gang.actions, *rollout.evictions, *restore.actions)
    actions = (*admission.actions, *actions, *_prune(wanted, admission, seen))
    status = _status(wanted, before, seen, admission, gang.status, rollout, restore)
    if seen.ledger is None and wanted.missing_secret is None:  # else nobody will read it soon
        status = keep_unread(before, status)
    looks = [admission.look_again_s, gang.look_again_s, restore.look_again_s]
    looks.append(EVICTION_LOOK_AGAIN_S if rollout.evictions else None)
    looks.append(NAME_TAKEN_LOOK_AGAIN_S if seen.taken else None)
    looks.append(SECRET_LOOK_AGAIN_S if wanted.missing_secret is not None else None)
    return Step(actions=actions, status=status, look_again_s=min((s for s in looks if s is not None), default=None))


def _admit(wanted: Wanted, before: WeightSyncStatus, seen: Seen) -> Admission:
    if wanted.missing_secret is not None:
        return Admission(reason=Reason.SECRET_MISSING, message=_without_secret(wanted), preflight=before.preflight)
    if isinstance(wanted.rendered, SpecError):
        return Admission(reason=Reason.SPEC_INVALID, message=str(wanted.rendered), preflight=before.preflight)
    if wanted.in_force is not None and wanted.in_force_revision == wanted.revision:
        return Admission(admitted=True, preflight=before.preflight)
    pod = preflight_pod(wanted.ctx, wanted.rendered)
    return step_admission(wanted.revision, wanted.rendered, pod, before.preflight, seen)


def _without_secret(wanted: Wanted) -> str:
    if wanted.in_force is None:
        return f"{wanted.missing_secret}; nothing is made before"
    return (
        f"{wanted.missing_secret}; until then pods that run go on and none starts, and of the spec only suspend, replicas and "
        "restarts take effect"
    )


def _put_in_force(wanted: Wanted, before: WeightSyncStatus, seen: Seen, admission: Admission) -> Step:
    """Keep the render and note it; the next pass applies it."""
    if isinstance(wanted.rendered, SpecError):
        raise wanted.rendered
    revisions = seen.of_kind("ControllerRevision", Component.CONTRACT)
    number = 1 + max((revision["revision"] for revision in revisions), default=0)
    keep = Apply(manifest=stamped(revision_object(wanted.ctx, wanted.revision, wanted.rendered, number)))
    noted = dataclasses.replace(wanted, in_force=wanted.rendered, in_force_revision=wanted.revision)
    status = _status(noted, before, seen, admission, before.trainer, Rollout(), Restore())
    return Step(actions=(keep,), status=status, look_again_s=0)


def _upkeep(wanted: Wanted, render: Render, seen: Seen) -> tuple[Action, ...]:
    """Whatever of the stored render is missing or was changed."""
    replicas = 0 if wanted.ctx.spec.suspend else wanted.ctx.spec.inference.replicas
    account, *rest = base_at(render, _certificate(wanted, render, seen))
    secrets = () if wanted.secret is None else (wanted.secret,)
    manifests = [stamped(m) for m in (account, *secrets, *rest, engines_at(render, replicas))]
    return tuple(
        Apply(manifest=manifest)
        for manifest in manifests
        if needs_apply(manifest, seen.child(manifest["kind"], manifest["metadata"]["name"]))
    )


def _certificate(wanted: Wanted, render: Render, seen: Seen) -> str:
    """What the Secret of the Redis in force holds now, else what its pods were started with.

    A Secret that is gone, a spec without TLS, or one that names another Secret and is not admitted yet restarts nothing.
    """
    tls = wanted.ctx.spec.redis.tls
    if wanted.certificate and tls is not None and tls.secret_ref.name == render.certificate_secret:
        return wanted.certificate
    return certificate_of(seen.child("Deployment", wanted.ctx.child("redis")))


def _step_gang(wanted: Wanted, render: Render, before: TrainerStatus, seen: Seen) -> GangStep:
    spec = wanted.ctx.spec
    ours = render.names("Deployment")
    waiting = [part for part in ours if not is_available(seen.child("Deployment", part))]
    wish = GangWish(
        template=render.trainer,
        spec_hash=render.trainer_hash,
        restarts=spec.trainer.restarts,
        suspend=spec.suspend,
        waiting_for=" and ".join(waiting),
        restores=render.restore is not None,
    )
    return step_gang(wish, before, seen)


def _step_rollout(wanted: Wanted, render: Render, gang: TrainerStatus, seen: Seen) -> Rollout:
    engines = seen.child("StatefulSet", render.engines["metadata"]["name"])
    if engines is None or wanted.ctx.spec.suspend:
        return Rollout()
    return step_rollout(
        engines,
        seen,
        max_unavailable=wanted.ctx.spec.inference.max_unavailable,
        session=render.session,
        trainer_runs=gang.state is TrainerState.RUNNING,
        lenders=observe_fleet(seen, wanted.ctx.spec.inference.replicas).lenders,
    )


def _step_restore(wanted: Wanted, render: Render, before: WeightSyncStatus, gang: TrainerStatus, seen: Seen) -> Restore:
    spec, last = wanted.ctx.spec, _last_push(before, seen)
    wish = RestoreWish(
        template=render.restore,
        suspend=spec.suspend,
        quorum=spec.transfer.quorum or 1,
        pushed_at=None if last is None else seconds(last.finished_at),
    )
    fleet = observe_fleet(seen, spec.inference.replicas, _version(wanted, before, seen).committed)
    return step_restore(wish, gang, fleet, seen)


def _prune(wanted: Wanted, admission: Admission, seen: Seen) -> tuple[Action, ...]:
    waited_for = None
    if not admission.admitted and not isinstance(wanted.rendered, SpecError):
        pod = preflight_pod(wanted.ctx, wanted.rendered)["metadata"]["name"]
        noted = admission.preflight is not None and pod.endswith(admission.preflight.hash)
        waited_for = None if noted else pod
    stale = list(prune.stale_preflights(seen, waited_for))
    if wanted.in_force is not None:
        stale += prune.stale_contracts(seen, wanted.in_force.contract_name)
        stale += prune.stale_claim_templates(seen, wanted.in_force.names("ResourceClaimTemplate"))
        stale += prune.stale_policies(seen, wanted.in_force.names("NetworkPolicy"))
        stale += prune.stale_revisions(seen, wanted.in_force_revision)
    return tuple(stale)


def _status(
    wanted: Wanted,
    before: WeightSyncStatus,
    seen: Seen,
    admission: Admission,
    gang: TrainerStatus,
    rollout: Rollout,
    restore: Restore,
) -> WeightSyncStatus:
    spec, render, owner = wanted.ctx.spec, wanted.in_force, wanted.ctx.owner
    generation = seen.resource["metadata"]["generation"]
    version = _version(wanted, before, seen)
    fleet = observe_fleet(seen, 0 if spec.suspend else spec.inference.replicas, version.committed)
    fabric, transports = _fabric(wanted)
    facts = Facts(
        seen=seen,
        admission=admission,
        in_force=render is not None,
        gang=gang,
        fleet=fleet,
        rollout=rollout,
        restore=restore,
        suspend=spec.suspend,
        transports=transports,
        update_pending=_update_pending(wanted),
        door=_door(wanted),
        missing_secret="" if wanted.missing_secret is None else str(wanted.missing_secret),
    )
    return WeightSyncStatus(
        observed_generation=generation,
        revision=wanted.in_force_revision,
        model=wanted.ctx.model_name if render is None else render.model_name,
        conditions=conditions(facts, before.conditions, generation),
        version=version,
        last_push=_last_push(before, seen),
        inference=fleet.numbers(),
        selector=",".join(f"{k}={v}" for k, v in selector_labels(owner.name, Component.INFERENCE).items()),
        replicas=fleet.shown(),
        trainer=gang,
        fabric=fabric,
        preflight=admission.preflight,
    )


def _fabric(wanted: Wanted) -> tuple[FabricStatus, tuple[str, ...]]:
    """The fabric in force, or the one that will be, and the transports that it should show."""
    render, chosen = wanted.in_force, wanted.ctx.chosen
    if render is not None:
        return FabricStatus(profile=render.profile, reason=render.fabric_reason), render.transports
    if isinstance(chosen, SpecError):
        return FabricStatus(reason=chosen.message), ()
    profile = wanted.ctx.profile
    reason = profile.reason if chosen is None else chosen.reason
    return FabricStatus(profile=profile.name, reason=reason), profile.transports


def _door(wanted: Wanted) -> Door:
    if wanted.ctx.spec.model_express.external is not None:
        return Door.EXTERNAL
    if wanted.in_force is not None and wanted.in_force.enforces:
        return Door.MEMBERS
    return Door.MEMBERS_LATER if wanted.ctx.enforces else Door.OPEN


def _update_pending(wanted: Wanted) -> bool:
    """True when this operator would render the spec in force in another way."""
    if wanted.in_force is None or isinstance(wanted.fresh, SpecError) or wanted.in_force_revision != wanted.revision:
        return False
    return wanted.fresh.comparable() != wanted.in_force.comparable()


def _version(wanted: Wanted, before: WeightSyncStatus, seen: Seen) -> VersionStatus:
    """What the ledger says; of the same session no less than before, since a Redis may come back empty."""
    ledger, known = seen.ledger, before.version
    if ledger is None or ledger.error:
        return known
    session = "" if wanted.in_force is None else wanted.in_force.session
    floor = known if known.session == session else VersionStatus()
    return VersionStatus(
        published=max(floor.published, ledger.published),
        committed=max(floor.committed, ledger.version),
        session=session,
    )


def _last_push(before: WeightSyncStatus, seen: Seen) -> LastPush | None:
    push = None if seen.ledger is None else seen.ledger.last_push
    return before.last_push if push is None else _shown_push(push)


def _shown_push(push: PushSummary) -> LastPush:
    """Rounded to what a person reads, so that equal pushes are equal."""
    gbps = float(f"{push.gbps:.3g}")
    return LastPush(
        version=push.version,
        epoch=push.epoch,
        step=push.step,
        source=push.source[:63],
        outcome=push.outcome[:16],
        reason=push.reason[:1024],
        seconds=round(push.seconds, 4),
        bytes=push.bytes,
        gbps=gbps,
        throughput=f"{gbps:g} GB/s",
        pause_seconds=round(push.pause_seconds, 4),
        digest=push.digest[:64],
        digest_ok=push.digest_ok,
        phases={phase: round(took_s, 4) for phase, took_s in sorted(push.phases.items())[:32]},
        finished_at=timestamp(push.finished_at) if push.finished_at else None,
    )
