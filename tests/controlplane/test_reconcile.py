"""Passes of the reconciler against a real API server, in this process, so that every request can be counted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml

from tests.controlplane.builders import DEFAULTS, MINIMAL, merged
from tests.controlplane.kube import Kube, Kubelet, wait_until
from tests.controlplane.passes import DrivenOperator, drive
from weightsync_operator.api.names import PLURAL, Component

ROOT = Path(__file__).parents[2]
TWO = merged(
    MINIMAL,
    {
        "trainer": {
            "nodes": 2,
            "podTemplate": {"spec": {"containers": [{"name": "trainer", "resources": {"requests": {"cpu": "0.2"}}}]}},
        },
        "redis": {"resources": {"requests": {"memory": "1024Mi"}, "limits": {"memory": "2048Mi"}}},
    },
)


async def _bring_up(operator: DrivenOperator, kube: Kube, kubelet: Kubelet) -> None:
    await asyncio.to_thread(kube.create, TWO)
    await operator.settle()
    await asyncio.to_thread(kubelet.answer_preflight)
    await operator.settle()
    await asyncio.to_thread(kubelet.make_ready, Component.REDIS, Component.MODEL_EXPRESS)
    await asyncio.to_thread(_wait_available, kube)
    await operator.settle()


def _wait_available(kube: Kube) -> None:
    def available() -> list[bool]:
        sets = kube.list("deployments").values()
        return [d.get("status", {}).get("availableReplicas") == 1 for d in sets]

    wait_until("Redis and ModelExpress are available", available, lambda up: up == [True, True])


@pytest.mark.parametrize(
    "manifest", sorted((ROOT / "examples").glob("*/weightsync.yaml")), ids=lambda path: path.parent.name
)
def test_every_example_is_taken_and_so_are_its_children(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path, manifest: Path
) -> None:
    example = yaml.safe_load(manifest.read_text())

    async def play(operator: DrivenOperator) -> None:
        await asyncio.to_thread(kube.create, example["spec"])
        await operator.settle()
        assert kube.condition("SpecValid")[:2] == ("Unknown", "PreflightRunning")
        await asyncio.to_thread(kubelet.answer_preflight)
        await operator.settle()
        assert kube.condition("SpecValid")[0] == "True"
        assert kube.list("statefulsets")["ws-inference"]["spec"]["replicas"] == example["spec"]["inference"]["replicas"]

    drive(operator_kubeconfig, kube, play)


@pytest.mark.failure_mode(39)
def test_a_second_pass_changes_nothing_and_neither_does_a_second_operator(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path
) -> None:
    """1 all is made; 2 ten more passes ask for no change; 3 a fresh operator with no memory asks for none either."""

    async def first(operator: DrivenOperator) -> None:
        await _bring_up(operator, kube, kubelet)
        await operator.settle()
        operator.cluster.changes.clear()
        for _ in range(5):
            await operator.reconciler.reconcile(operator.key)
            await operator.one_pass()
        assert operator.cluster.changes == []

    async def second(operator: DrivenOperator) -> None:
        for _ in range(5):
            await operator.reconciler.reconcile(operator.key)
        assert [change for change in operator.cluster.changes if not change[1].endswith("/status")] == []

    drive(operator_kubeconfig, kube, first)
    drive(operator_kubeconfig, kube, second)


@pytest.mark.failure_mode(44)
@pytest.mark.failure_mode(68)
def test_a_new_operator_with_other_images_restarts_nothing_until_the_spec_changes(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path
) -> None:
    async def old(operator: DrivenOperator) -> None:
        await _bring_up(operator, kube, kubelet)

    async def new(operator: DrivenOperator) -> None:
        await operator.settle()
        assert _images(kube) == {"ws-inference": DEFAULTS.runtime_image, "ws-trainer-1": DEFAULTS.runtime_image}
        assert kube.condition("UpdatePending")[:2] == ("True", "OperatorChanged")
        await asyncio.to_thread(kube.kubectl, "scale", "weightsync", "ws", "--replicas=3")
        await operator.settle()
        assert _images(kube)["ws-inference"] == DEFAULTS.runtime_image, "scaling is no change of the render"
        kube.patch(PLURAL, "ws", {"spec": {"transfer": {"timeoutSeconds": 99}}})
        await operator.settle()
        await asyncio.to_thread(kubelet.answer_preflight)
        await operator.settle()
        assert _images(kube)["ws-inference"] == "new/runtime:2"
        assert kube.condition("UpdatePending")[0] == "False"

    drive(operator_kubeconfig, kube, old)
    drive(operator_kubeconfig, kube, new, runtime_image="new/runtime:2")


def _images(kube: Kube) -> dict[str, str]:
    owners = {**kube.list("statefulsets"), **kube.list("jobs")}
    return {name: child["spec"]["template"]["spec"]["containers"][0]["image"] for name, child in owners.items()}


def test_going_back_to_an_earlier_spec_takes_its_render_without_asking_again(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path
) -> None:
    async def play(operator: DrivenOperator) -> None:
        await _bring_up(operator, kube, kubelet)
        first = kube.status()["revision"]
        kube.patch(PLURAL, "ws", {"spec": {"transfer": {"timeoutSeconds": 99}}})
        await operator.settle()
        second = kube.status()["revision"]
        kube.patch(PLURAL, "ws", {"spec": {"transfer": {"timeoutSeconds": 120}}})
        await operator.settle()
        assert (kube.status()["revision"], second != first) == (first, True)
        revisions = kube.list("controllerrevisions")
        assert {f"ws-{first}", f"ws-{second}"} <= set(revisions)

    drive(operator_kubeconfig, kube, play)


@pytest.mark.failure_mode(63)
def test_a_lost_status_starts_no_second_gang_beside_the_first(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path
) -> None:
    """Without its notes the operator clears what runs away before it numbers a new epoch."""

    async def play(operator: DrivenOperator) -> None:
        await _bring_up(operator, kube, kubelet)
        kube.patch(PLURAL, "ws", {"status": None}, status=True)
        for _ in range(30):
            await operator.one_pass()
            assert len(kube.list("jobs")) <= 1
        assert kube.status()["revision"] != ""
        assert (kube.status()["trainer"]["epoch"], set(kube.list("jobs"))) == (2, {"ws-trainer-2"})

    drive(operator_kubeconfig, kube, play)
