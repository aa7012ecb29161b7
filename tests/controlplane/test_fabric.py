"""Fabrics: the pods that each profile makes, and what `auto` chooses from what nodes offer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from e2e.lab.lab import EMULATED_LABEL
from tests.controlplane.builders import make_context, make_pod, make_seen, make_spec, make_wanted
from tests.golden import fabrics
from weightsync_operator.api.names import LABEL_EMULATED_DEVICES, Component
from weightsync_operator.listing import Listings
from weightsync_operator.metrics import Metrics
from weightsync_operator.plan import prune
from weightsync_operator.plan.build.context import Context
from weightsync_operator.plan.decide import decide
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.fabric import PROFILES, FabricChoice, choose_fabric
from weightsync_operator.plan.render import Render, render, revision_object
from weightsync_operator.reconcile import Reconciler, _optional_kinds

GPU = {"nvidia.com/gpu": "8"}
LAB = {LABEL_EMULATED_DEVICES: "true"}


def _node(name: str, *, labels: dict[str, str] | None = None, ready: str = "True", spec: Any = None) -> dict[str, Any]:
    conditions = [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": ready}]
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": spec or {},
        "status": {"allocatable": {"cpu": "8"}, "conditions": conditions},
    }


def _gpu_node(name: str, offers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    node = _node(name, **fields)
    node["status"]["allocatable"] |= {**GPU, **(offers or {})}
    return node


def _choose(*nodes: dict[str, Any], count: int = 1, gpus: bool = True) -> FabricChoice:
    return choose_fabric(nodes, gpus=gpus, count=count)


@pytest.mark.failure_mode(32)
@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_makes_the_pods_that_are_written_down(profile: str) -> None:
    """A difference that is meant: `python -m tests.golden.fabrics`."""
    golden = yaml.safe_load((fabrics.FOLDER / f"{profile}.yaml").read_text())
    assert yaml.safe_load(yaml.safe_dump(fabrics.made(profile))) == golden


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in fabrics.FOLDER.glob("*.yaml")} == set(PROFILES)


@pytest.mark.failure_mode(34)
def test_claimed_gpus_and_nics_are_paired_by_their_pcie_root() -> None:
    templates = {
        name.split("-")[1]: spec["spec"]["devices"] for name, spec in fabrics.made("dra")["claimTemplates"].items()
    }
    assert [c["requests"] for c in templates["trainer"]["constraints"]] == [["gpu-0", "nic-0"], ["gpu-1", "nic-1"]]
    assert len(templates["trainer"]["requests"]) == 4 + 2
    assert {c["matchAttribute"] for c in templates["inference"]["constraints"]} == {"resource.kubernetes.io/pcieRoot"}


@pytest.mark.failure_mode(67)
@pytest.mark.parametrize(("profile", "memlock"), [("ib", "node"), ("tcp", "rootWithIpcLock")])
def test_memlock_of_the_spec_stands_over_the_profiles(profile: str, memlock: str) -> None:
    rendered = render(make_context(fabric={"profile": profile, "memlock": memlock}))
    for owner in (rendered.trainer, rendered.engines):
        (container,) = owner["spec"]["template"]["spec"]["containers"]
        root = container["securityContext"].get("runAsUser") == 0
        locks = "IPC_LOCK" in container["securityContext"]["capabilities"].get("add", [])
        assert root == locks == (memlock == "rootWithIpcLock")


@pytest.mark.parametrize(
    ("profile", "offers"),
    [
        ("ib", {"rdma/ib": "8"}),
        ("roce", {"rdma/roce_gdr": "2"}),
        ("hca-shared", {"rdma/hca_shared_devices_a": "1k"}),
        ("gke", {"networking.gke.io.networks/rdma-0": "1"}),
        ("ib", {"rdma/ib": "8", "rdma/hca_shared_devices_a": "63"}),
    ],
)
def test_auto_takes_what_every_node_with_gpus_offers(profile: str, offers: dict[str, str]) -> None:
    choice = _choose(_gpu_node("a", offers), _gpu_node("b", offers), _node("cpu"), count=2)
    assert choice.profile == profile
    assert "each of 2 nodes with GPUs offers" in choice.reason
    assert _choose(_node("a", labels=None), gpus=False).profile == "tcp"


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([_gpu_node("a")], "no RDMA device on 1 nodes with GPUs"),
        ([_gpu_node("a", {"rdma/ib": "8"}), _gpu_node("b")], "rdma/ib is missing on b of 2"),
        ([_gpu_node("a", {"rdma/ib": "1"})], "no RDMA device"),
        ([_gpu_node("a", {"vpc.amazonaws.com/efa": "32"})], "EFA, which UCX cannot use"),
    ],
)
def test_auto_takes_tcp_and_says_why_when_a_pod_might_not_find_its_device(nodes: list[Any], words: str) -> None:
    choice = _choose(*nodes, count=2)
    assert choice.profile == "tcp"
    assert words in choice.reason


def test_auto_does_not_take_the_labs_devices_for_real_ones() -> None:
    """Seen to fail with the branch on the label taken out: the lab's devices are called as a shared plug-in's."""
    offers = {"rdma/hca_shared_devices_a": "8"}
    assert f"{LABEL_EMULATED_DEVICES}=true" == EMULATED_LABEL
    assert _choose(_gpu_node("a", offers, labels=LAB)).profile == "emulated"
    assert _choose(_gpu_node("a", offers, labels=LAB), _gpu_node("b", offers)).profile == "tcp"


@pytest.mark.parametrize(
    "node",
    [
        _gpu_node("a", ready="False"),
        _gpu_node("a", spec={"unschedulable": True}),
        _gpu_node("a", spec={"taints": [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]}),
        _node("a"),
    ],
)
def test_auto_waits_for_a_node_that_could_run_a_pod(node: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="auto found no ready nodes with GPUs"):
        _choose(node)


def _auto(chosen: FabricChoice | SpecError) -> Context:
    return make_context(chosen=chosen, fabric={"profile": "auto"})


def test_what_auto_chose_and_why_is_in_the_status_and_in_the_render() -> None:
    """The reason outlives the operator: it stands in the stored render."""
    ctx = _auto(FabricChoice(profile="ib", reason="auto: each of 2 nodes with GPUs offers rdma/ib"))
    wanted = make_wanted(ctx)
    assert wanted.in_force is not None
    kept = Render.from_data(wanted.in_force.to_data())
    assert (kept.profile, kept.fabric_reason) == ("ib", "auto: each of 2 nodes with GPUs offers rdma/ib")
    status = decide(wanted, make_seen(ctx)).status
    assert (status.fabric.profile, status.fabric.reason) == ("ib", kept.fabric_reason)
    (container,) = kept.engines["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["rdma/ib"] == "1"


@pytest.mark.parametrize(
    "named", [{"profile": "tcp"}, {"profile": "hca-shared", "resourceName": "rdma/foo"}, {"profile": "emulated"}]
)
def test_auto_after_a_profile_that_was_named_asks_the_nodes(named: dict[str, Any]) -> None:
    """Its own earlier answer is kept; a name came with fields that `auto` forbids, and would be in force without them."""
    nodes = [_gpu_node("a", {"rdma/ib": "4"})]
    assert _auto_after(render(make_context(fabric=named)), nodes).profile == "ib"
    chosen = FabricChoice(profile="roce", reason="all nodes offer it")
    assert _auto_after(render(make_context(fabric={"profile": "auto"}, chosen=chosen)), nodes) == chosen


def _auto_after(in_force: Render, nodes: list[dict[str, Any]]) -> Any:
    async def nodes_now() -> list[dict[str, Any]]:
        return nodes

    cluster: Any = SimpleNamespace(nodes=nodes_now)
    settings: Any = SimpleNamespace(namespaces=())
    reconciler = Reconciler(cluster, Listings(), SimpleNamespace(), settings, Metrics())  # type: ignore[arg-type]
    return asyncio.run(reconciler._chosen_fabric(make_spec(fabric={"profile": "auto"}), in_force))


def test_an_undecided_auto_is_told_by_its_field() -> None:
    ctx = _auto(SpecError("spec.fabric.profile", "auto found no ready nodes"))
    with pytest.raises(SpecError, match=r"spec\.fabric\.profile: auto found no ready nodes"):
        render(ctx)


def test_claims_of_an_older_spec_go_once_no_pod_uses_them() -> None:
    ctx = make_context(fabric={"profile": "dra"})
    old = {"kind": "ResourceClaimTemplate", "metadata": {"name": "ws-trainer-old", "uid": "u", "labels": _labels(ctx)}}
    pod = make_pod("ws-trainer-1-0", Component.TRAINER)
    pod["spec"]["resourceClaims"] = [{"name": "devices", "resourceClaimTemplateName": "ws-trainer-old"}]
    assert list(prune.stale_claim_templates(make_seen(ctx, old, pod), ())) == []
    assert [delete.name for delete in prune.stale_claim_templates(make_seen(ctx, old), ())] == ["ws-trainer-old"]
    assert list(prune.stale_claim_templates(make_seen(ctx, old), ("ws-trainer-old",))) == []


def test_claims_are_looked_for_as_long_as_a_render_or_a_pod_may_have_them() -> None:
    """Seen to fail with the render in force alone: after dra nobody saw the templates that pods still held."""
    wanted = make_wanted(make_context(fabric={"profile": "dra"}))
    assert isinstance(wanted.fresh, Render)
    stored = revision_object(wanted.ctx, wanted.revision, wanted.fresh, 1)
    claim = next(child for child in wanted.fresh.base if child["kind"] == "ResourceClaimTemplate")
    for left in (stored, claim):
        seen = make_seen(make_context(), left)
        assert _optional_kinds(seen.children) == {"ResourceClaimTemplate"}
    plain = make_wanted(make_context())
    assert isinstance(plain.fresh, Render)
    seen = make_seen(make_context(), revision_object(plain.ctx, plain.revision, plain.fresh, 2))
    assert _optional_kinds(seen.children) == frozenset()


def _labels(ctx: Context) -> dict[str, str]:
    return ctx.labels(Component.TRAINER)
