"""Children that only some specs have, on a real API server: taken, kept up, and written once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controlplane.builders import MINIMAL, merged
from tests.controlplane.kube import MERGE, Kube, Kubelet
from tests.controlplane.passes import DrivenOperator, drive
from tests.golden.fabrics import SPECS
from weightsync_operator.api.names import PLURAL

NODES = "/api/v1/nodes"


async def _admit(operator: DrivenOperator, kube: Kube, kubelet: Kubelet, spec: dict[str, Any]) -> None:
    await asyncio.to_thread(kube.create, merged(MINIMAL, spec))
    await operator.settle()
    await asyncio.to_thread(kubelet.answer_preflight)
    await operator.settle()


@pytest.mark.failure_mode(39)
@pytest.mark.parametrize("profile", ["dra", "sriov", "gke"])
def test_the_pods_of_a_fabric_are_taken_and_written_once(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path, profile: str
) -> None:
    """With a volume for the ledger, so that every optional kind is among them."""
    spec = {"fabric": {"profile": profile, **SPECS[profile]}, "redis": {"persistence": {"size": "1024Mi"}}}

    async def play(operator: DrivenOperator) -> None:
        await _admit(operator, kube, kubelet, spec)
        assert kube.condition("SpecValid")[0] == "True"
        assert set(kube.list("persistentvolumeclaims")) == {"ws-redis"}
        claims = kube.list("resourceclaimtemplates")
        assert len(claims) == (2 if profile == "dra" else 0)
        operator.cluster.changes.clear()
        for _ in range(5):
            await operator.one_pass()
        assert [change for change in operator.cluster.changes if not change[1].endswith("/status")] == []

        kube.patch(PLURAL, "ws", {"spec": {"inference": {"gpus": 4}}})
        await operator.settle()
        after = kube.list("resourceclaimtemplates")
        kept = {name for name in claims if "trainer" in name}
        assert kept <= set(after), "the trainer's claims did not change"

    drive(operator_kubeconfig, kube, play)


def test_what_an_older_spec_made_is_not_somebody_elses(kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path) -> None:
    """The new spec has no claims and is not admitted, so the old one's are kept up: they are not listed for it, but ours.

    Seen to fail where they were neither listed, because the new spec has none, nor told from another owner's.
    """

    async def play(operator: DrivenOperator) -> None:
        await _admit(operator, kube, kubelet, {"fabric": {"profile": "dra", **SPECS["dra"]}})
        assert kube.list("resourceclaimtemplates")
        gone = dict.fromkeys(SPECS["dra"])
        kube.patch(
            PLURAL, "ws", {"spec": {"fabric": {**gone, "profile": "tcp"}, "model": {"hostPath": "/models/another"}}}
        )
        await operator.settle()
        assert kube.condition("SpecValid")[0] != "True"
        assert kube.condition("Degraded")[1] != "NameTaken"

    drive(operator_kubeconfig, kube, play)


@pytest.fixture
def nodes(kube: Kube) -> Iterator[list[str]]:
    """Names of nodes that this test makes; the cluster has them only as long."""
    made: list[str] = []
    yield made
    for name in made:
        kube.request("DELETE", f"{NODES}/{name}")


def _make_node(kube: Kube, nodes: list[str], **resources: str) -> None:
    name = f"{kube.namespace[-6:]}-{len(nodes)}"
    kube.request("POST", NODES, {"metadata": {"name": name}})
    nodes.append(name)
    offers = {"nvidia.com/gpu": "8", **{key.replace("_", "/"): value for key, value in resources.items()}}
    status = {"capacity": offers, "allocatable": offers, "conditions": [{"type": "Ready", "status": "True"}]}
    kube.request("PATCH", f"{NODES}/{name}/status", {"status": status}, MERGE)


def test_auto_waits_for_nodes_chooses_once_and_stays_with_it(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path, nodes: list[str]
) -> None:
    """1 no node with GPUs: nothing is made; 2 one with InfiniBand: ib; 3 one without joins, the spec is edited: still ib."""

    async def play(operator: DrivenOperator) -> None:
        await asyncio.to_thread(kube.create, merged(MINIMAL, {"fabric": {"profile": "auto"}}))
        await operator.settle()
        status, reason, message = kube.condition("SpecValid")
        assert (status, reason) == ("False", "SpecInvalid")
        assert message.startswith("spec.fabric.profile: auto found no ready nodes with GPUs")
        assert kube.list("pods") == {}

        _make_node(kube, nodes, rdma_ib="8")
        await operator.settle()
        await asyncio.to_thread(kubelet.answer_preflight)
        await operator.settle()
        fabric = kube.status()["fabric"]
        assert fabric == {"profile": "ib", "reason": "auto: each of 1 nodes with GPUs offers rdma/ib"}

        _make_node(kube, nodes)
        kube.patch(PLURAL, "ws", {"spec": {"transfer": {"timeoutSeconds": 99}}})
        await operator.settle()
        assert kube.status()["fabric"] == fabric
        (container,) = kube.list("statefulsets")["ws-inference"]["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["rdma/ib"] == "1"
        assert kube.condition("UpdatePending")[0] == "False"

    drive(operator_kubeconfig, kube, play)
