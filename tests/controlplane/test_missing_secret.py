"""The Secret of an external Redis goes: what needs no password goes on, and a condition says what is missing and what cures it."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.controlplane.builders import MINIMAL, applied, make_context, make_pod, make_seen, make_wanted, merged
from tests.controlplane.kube import Kube, Kubelet
from tests.controlplane.passes import DrivenOperator, drive
from tests.fixtures.servers import free_port
from weightsync_operator.api.names import PLURAL, Component
from weightsync_operator.plan import decide as deciding
from weightsync_operator.plan.actions import Apply
from weightsync_operator.plan.decide import Wanted, decide
from weightsync_operator.plan.errors import SpecError

EXTERNAL = {"address": "redis:6379", "secretRef": {"name": "theirs"}}
MISSING = SpecError("spec.redis.external.secretRef", "Secret theirs is not in this namespace: create it")


def _without_secret(*, in_force: bool = True, **spec: Any) -> Wanted:
    """Up and running, or not yet; then the Secret is gone."""
    before = make_context(redis={"external": EXTERNAL})
    wanted = make_wanted(make_context(redis={"external": EXTERNAL}, **spec), in_force=before)
    nothing = {} if in_force else {"in_force": None, "in_force_revision": ""}
    return dataclasses.replace(wanted, secret=None, missing_secret=MISSING, **nothing)


def _conditions(wanted: Wanted, *children: dict[str, Any], **status: Any) -> dict[str, tuple[str, str, str]]:
    seen = make_seen(wanted.ctx, *children, status={"revision": wanted.in_force_revision, **status})
    return {c.type: (c.status, c.reason, c.message) for c in decide(wanted, seen).status.conditions}


def test_before_anything_was_made_nothing_is_and_the_cure_is_told() -> None:
    wanted = _without_secret(in_force=False)
    step = decide(wanted, make_seen(wanted.ctx))
    assert (step.actions, step.look_again_s) == ((), deciding.SECRET_LOOK_AGAIN_S)
    conditions = _conditions(wanted)
    assert conditions["SpecValid"] == ("False", "SecretMissing", f"{MISSING}; nothing is made before")
    assert conditions["LedgerReachable"][:2] == ("False", "SecretMissing")


def test_a_new_spec_waits_for_it_and_the_old_one_is_kept_up() -> None:
    """Seen to fail with the pass ended by the error: no action at all."""
    wanted = _without_secret(transfer={"timeoutSeconds": 7})
    children = [child for child in applied(wanted) if child["kind"] != "Service"]
    step = decide(wanted, make_seen(wanted.ctx, *children, status={"revision": wanted.in_force_revision}))
    made = {(a.manifest["kind"], a.manifest["metadata"]["name"]) for a in step.actions if isinstance(a, Apply)}
    assert ("Service", "ws-inference") in made
    assert not {kind for kind, _ in made} & {"ControllerRevision", "ConfigMap", "Secret"}
    assert "only suspend, replicas and restarts" in _conditions(wanted, *children)["SpecValid"][2]


def test_an_operator_that_starts_without_it_claims_no_view_of_the_ledger() -> None:
    """What another operator read stands in the status, and nobody reads on."""
    read = {"type": "LedgerReachable", "status": "True", "reason": "Reachable", "observedGeneration": 1}
    synced = {"type": "Synced", "status": "True", "reason": "InSync", "observedGeneration": 1}
    stamp = {"message": "", "lastTransitionTime": "2027-01-15T08:00:00Z"}
    before = [{**read, **stamp}, {**synced, **stamp}]
    conditions = _conditions(_without_secret(), conditions=before)
    assert conditions["LedgerReachable"][:2] == ("False", "SecretMissing")
    assert conditions["Synced"][:2] == ("Unknown", "NotReadYet")


@pytest.mark.failure_mode(42)
def test_suspend_works_without_it() -> None:
    wanted = _without_secret(suspend=True)
    children = applied(wanted)
    step = decide(wanted, make_seen(wanted.ctx, *children, status={"revision": wanted.in_force_revision}))
    (engines,) = [a.manifest for a in step.actions if isinstance(a, Apply) and a.manifest["kind"] == "StatefulSet"]
    assert engines["spec"]["replicas"] == 0
    pod = make_pod("ws-inference-0", Component.INFERENCE)
    assert _conditions(wanted, *children, pod)["Suspended"][:2] == ("False", "Suspending")
    assert _conditions(wanted, *children)["Suspended"][:2] == ("True", "Suspended")


def _make_secret(kube: Kube) -> None:
    data = {"password": base64.b64encode(b"secret").decode()}
    kube.request("POST", kube.path("secrets"), {"metadata": {"name": "theirs"}, "data": data})


@pytest.mark.failure_mode(42)
def test_drift_is_repaired_and_suspend_obeyed_without_it(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path
) -> None:
    """1 up; 2 the Secret goes, with a Service: that one comes back; 3 suspended; 4 the Secret is back: all is as it was."""
    external = {"address": f"127.0.0.1:{free_port()}", "secretRef": {"name": "theirs"}}
    spec = merged(MINIMAL, {"redis": {"external": external}})

    async def play(operator: DrivenOperator) -> None:
        await asyncio.to_thread(_make_secret, kube)
        await asyncio.to_thread(kube.create, spec)
        await operator.settle()
        await asyncio.to_thread(kubelet.answer_preflight)
        await operator.settle()
        await asyncio.to_thread(kubelet.wait_for, Component.INFERENCE, 1)
        revision = kube.status()["revision"]

        kube.delete("secrets", "theirs")
        kube.delete("services", "ws-engines")
        await operator.settle()
        assert kube.condition("SpecValid")[:2] == ("False", "SecretMissing")
        assert kube.get("services", "ws-engines") is not None

        kube.patch(PLURAL, "ws", {"spec": {"suspend": True}})
        await operator.settle()
        await asyncio.to_thread(kubelet.wait_for, Component.INFERENCE, 0)
        await operator.settle()
        assert kube.condition("Suspended")[:2] == ("True", "Suspended")

        await asyncio.to_thread(_make_secret, kube)
        await operator.settle()
        assert kube.condition("SpecValid")[:2] == ("True", "Valid")
        assert kube.status()["revision"] == revision

    drive(operator_kubeconfig, kube, play)
