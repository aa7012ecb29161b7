"""NetworkPolicies: who may reach whom, held against pods as a network would hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.controlplane.builders import applied, make_context, make_seen, make_wanted, without
from tests.controlplane.conftest import helm_template
from weightsync_operator.api.names import Component
from weightsync_operator.plan import prune
from weightsync_operator.plan.actions import Delete
from weightsync_operator.plan.build.context import selector_labels
from weightsync_operator.plan.build.policies import OPERATOR_LABELS, network_policies
from weightsync_operator.plan.decide import decide

GOLDEN = Path(__file__).parents[1] / "golden" / "network-policies.yaml"
ROLES = {role: selector_labels("ws", role) for role in (*Component,)}
PEERS: dict[str, tuple[str, dict[str, str]]] = {
    **{role.value: ("ns", labels) for role, labels in ROLES.items()},
    "other resource's trainer": ("ns", selector_labels("other", Component.TRAINER)),
    "trainer of the same name elsewhere": ("elsewhere", selector_labels("ws", Component.TRAINER)),
    "operator": ("weightsync-system", {**OPERATOR_LABELS, "pod-template-hash": "x"}),
    "client": ("ns", {"app": "chat"}),
}


def _chooses(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def _admits(rule: dict[str, Any], peer: str, port: int) -> bool:
    """As a network reads a rule: no `from` is anybody, no `ports` is any; no namespaceSelector is the policy's namespace."""
    namespace, labels = PEERS[peer]
    ports = rule.get("ports")
    sources = rule.get("from")
    right_port = ports is None or any(entry["port"] == port for entry in ports)
    here = [s for s in sources or [] if "namespaceSelector" in s or namespace == "ns"]
    return right_port and (sources is None or any(_chooses(source["podSelector"], labels) for source in here))


def _reach(role: Component, port: int, **over: Any) -> set[str]:
    """Peers that may connect to a pod of `role`; everybody when no policy chooses it."""
    policies = [p for p in network_policies(make_context(**over)) if _chooses(p["spec"]["podSelector"], ROLES[role])]
    if not policies:
        return set(PEERS)
    rules = [rule for policy in policies for rule in policy["spec"]["ingress"]]
    return {peer for peer in PEERS if any(_admits(rule, peer, port) for rule in rules)}


@pytest.mark.failure_mode(36)
@pytest.mark.parametrize(
    ("role", "port", "who"),
    [
        (Component.REDIS, 6379, {"trainer", "inference", "modelexpress", "operator"}),
        (Component.REDIS, 22, set()),
        (Component.MODEL_EXPRESS, 8001, {"trainer", "inference"}),
        (Component.MODEL_EXPRESS, 9401, set(PEERS)),
        (Component.TRAINER, 29500, {"trainer", "inference"}),
        (Component.TRAINER, 40123, {"trainer", "inference"}),
        (Component.INFERENCE, 40123, {"trainer", "inference"}),
        (Component.INFERENCE, 8000, set(PEERS)),
    ],
)
def test_only_members_reach_what_is_not_for_clients(role: Component, port: int, who: set[str]) -> None:
    assert _reach(role, port) == who


def test_a_pod_that_pushes_a_checkpoint_is_a_member_where_there_may_be_one() -> None:
    over = {"transfer": {"checkpoint": {"hostPath": "/c"}}}
    members = {"trainer", "inference", "restore"}
    assert _reach(Component.REDIS, 6379, **over) == {*members, "modelexpress", "operator"}
    assert _reach(Component.MODEL_EXPRESS, 8001, **over) == members
    assert _reach(Component.INFERENCE, 40123, **over) == _reach(Component.RESTORE, 40123, **over) == members
    host = {"transfer": {"checkpoint": {"hostPath": "/c", "podTemplate": {"spec": {"hostNetwork": True}}}}}
    assert network_policies(make_context(**host)) == []


def test_metrics_of_each_trainer_rank_are_for_anyone_and_nothing_beside_them() -> None:
    over = {"trainer": {"gpusPerNode": 2}, "telemetry": {"metricsPort": 9400}}
    assert _reach(Component.TRAINER, 9400, **over) == _reach(Component.TRAINER, 9401, **over) == set(PEERS)
    assert _reach(Component.TRAINER, 9402, **over) == {"trainer", "inference"}
    assert _reach(Component.TRAINER, 9400) == {"trainer", "inference"}


def test_nothing_is_said_about_what_pods_may_call() -> None:
    """A policy with egress would have to know the cluster's DNS, every external Redis and every store."""
    for policy in network_policies(make_context()):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        assert "egress" not in policy["spec"]


def test_what_is_somebody_elses_has_no_policy_of_ours() -> None:
    redis = {"external": {"address": "r:1", "secretRef": {"name": "s"}}}
    ctx = make_context(redis=redis, modelExpress={"external": {"address": "m:1"}})
    assert [policy["metadata"]["name"] for policy in network_policies(ctx)] == ["ws-trainer", "ws-inference"]


@pytest.mark.parametrize("role", ["trainer", "inference"])
def test_pods_on_the_hosts_network_are_not_shut_out(role: str) -> None:
    """They come from a node's address: policies by label would cut them off from Redis, ModelExpress and each other."""
    assert network_policies(make_context(**{role: {"podTemplate": {"spec": {"hostNetwork": True}}}})) == []
    assert network_policies(make_context(**{role: {"podTemplate": {"spec": {"hostNetwork": False}}}})) != []


def test_the_policies_are_those_that_are_written_down() -> None:
    specs = {policy["metadata"]["name"]: policy["spec"] for policy in network_policies(make_context())}
    assert specs == yaml.safe_load(GOLDEN.read_text())


def test_the_operators_pods_have_the_labels_that_the_policies_look_for() -> None:
    manifests = yaml.safe_load_all(helm_template().stdout)
    deployment = next(m for m in manifests if m and m["kind"] == "Deployment")
    assert OPERATOR_LABELS.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_a_policy_that_the_render_in_force_does_not_have_is_taken_away() -> None:
    wanted = make_wanted(make_context())
    assert wanted.in_force is not None
    stray = {"kind": "NetworkPolicy", "metadata": {"name": "ws-old", "uid": "u", "labels": ROLES[Component.REDIS]}}
    status = {"revision": wanted.in_force_revision}
    step = decide(without(wanted), make_seen(wanted.ctx, *applied(wanted), stray, status=status))
    assert [action.name for action in step.actions if isinstance(action, Delete)] == ["ws-old"]
    kept = make_seen(wanted.ctx, stray)
    assert list(prune.stale_policies(kept, ("ws-old",))) == []
