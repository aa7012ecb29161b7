"""`kubectl weightsync`: what it prints of fetched objects, and that it fetches them with a reader's rights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.controlplane.builders import make_job, make_pod
from tests.controlplane.kube import Kube
from weightsync_operator.api.names import API_VERSION, LABEL_COMPONENT, PLURAL, Component
from weightsync_operator.plugin import views
from weightsync_operator.plugin.__main__ import main

PUSH = {
    "version": 42, "epoch": 1, "step": 41, "outcome": "COMMIT", "seconds": 2.5, "bytes": 16_000_000_000, "GBps": 8.0,
    "throughput": "8 GB/s", "pauseSeconds": 0.25, "digest": "ab12", "digestOk": True,
    "phases": {"wire": 2.0, "plan": 0.1, "commit": 0.4},
}  # fmt: skip
STATUS = {
    "observedGeneration": 2,
    "version": {"published": 43, "committed": 42},
    "inference": {"replicas": 2, "ready": 1, "current": 1},
    "trainer": {"epoch": 1, "state": "Running"},
    "replicas": [
        {"name": "ws-inference-1", "version": 41, "state": "CLEAN", "reason": "behind"},
        {"name": "ws-inference-0", "version": 42, "state": "CLEAN"},
    ],
    "lastPush": PUSH,
    "conditions": [
        {"type": "SpecValid", "status": "True", "reason": "Valid", "message": ""},
        {"type": "Synced", "status": "False", "reason": "Behind", "message": "1 of 2 engines do not hold version 42"},
        {"type": "TransportVerified", "status": "True", "reason": "ExpectedTransport", "message": "used tcp"},
        {
            "type": "Degraded",
            "status": "True",
            "reason": "EnginesDirty",
            "message": "hold torn weights: ws-inference-1",
        },
    ],
}


def _resource(**over: Any) -> dict[str, Any]:
    metadata = {"name": "ws", "namespace": "team", "uid": "root", "generation": 2}
    return {"metadata": metadata, "spec": {"inference": {"replicas": 2}}, "status": {**STATUS, **over}}


def _child(kind: str, name: str, owner: str = "root", component: str = "", **fields: Any) -> dict[str, Any]:
    metadata = {
        "name": name,
        "uid": f"uid-{name}",
        "ownerReferences": [{"uid": owner, "controller": True}],
        "labels": {LABEL_COMPONENT: component},
    }
    return {"kind": kind, "metadata": metadata, **fields}


def _owned(child: dict[str, Any], owner: str) -> dict[str, Any]:
    child["metadata"]["ownerReferences"] = [{"uid": owner, "controller": True}]
    return child


def test_the_tree_shows_each_child_below_its_owner_and_why_it_is_not_in_sync() -> None:
    waiting = {"name": "main", "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
    crashing = make_pod("ws-redis-x", Component.REDIS)
    crashing["status"]["containerStatuses"] = [waiting]
    children = [
        _owned(make_pod("ws-inference-1", deleting=True), "uid-ws-inference"),
        _owned(make_pod("ws-inference-0", ready=True), "uid-ws-inference"),
        _owned(crashing, "uid-of-a-replica-set"),
        _owned(make_job({"spec": {}}, 1), "root") | {"status": {"active": 2}},
        _child("StatefulSet", "ws-inference", spec={"replicas": 2}, status={"readyReplicas": 1}),
        _child("Deployment", "ws-redis", component=Component.REDIS, spec={"replicas": 1}),
        _child("Service", "ws-mx"),
    ]
    assert views.status(_resource(), children).splitlines() == [
        "WeightSync team/ws: version 42, 1 of 2 engines hold it, 1 answer; trainer Running, epoch 1",
        "  Degraded=True EnginesDirty: hold torn weights: ws-inference-1",
        "  Synced=False Behind: 1 of 2 engines do not hold version 42",
        "",
        "├─ Service ws-mx",
        "├─ Deployment ws-redis: 0 of 1 ready",
        "│  └─ Pod ws-redis-x: Running, CrashLoopBackOff, 2 restarts",
        "├─ StatefulSet ws-inference: 1 of 2 ready",
        "│  ├─ Pod ws-inference-0: Running, ready",
        "│  └─ Pod ws-inference-1: Running, ending",
        "└─ Job ws-trainer-1: epoch 1, 2 active",
    ]


@pytest.mark.parametrize(
    ("conditions", "line"),
    [
        ([], "  not looked at yet: does the operator run?"),
        ([{"type": "Synced", "status": "True", "reason": "InSync"}], "  in sync"),
        ([{"type": "Suspended", "status": "True", "reason": "Suspended"}], "  Suspended=True Suspended"),
    ],
)
def test_one_line_says_what_is_wrong_or_that_nothing_is(conditions: list[dict[str, Any]], line: str) -> None:
    assert views.status(_resource(conditions=conditions), []).splitlines()[1] == line


def test_versions_are_a_table_of_laggards_first() -> None:
    shown = _resource(inference={"replicas": 500})
    assert views.versions(shown).splitlines() == [
        "published 43, committed 42",
        "",
        "ENGINE           VERSION   STATE   WHY IT DOES NOT SERVE",
        "ws-inference-1   41        CLEAN   behind",
        "ws-inference-0   42        CLEAN",
        "and 498 more, none of them older",
    ]


def test_the_last_push_is_shown_by_phase_in_the_order_of_a_push() -> None:
    assert views.trace(_resource()).splitlines() == [
        "version 42 (epoch 1, step 41): COMMIT",
        "  2.5 s, 16000000000 bytes, 8 GB/s, pause 0.25 s",
        "",
        f"  plan      0.1000 s  {'█' * 2}",
        f"  wire      2.0000 s  {'█' * 40}",
        f"  commit    0.4000 s  {'█' * 8}",
    ]
    assert views.trace(_resource(lastPush=None)) == "no push has ended yet"


def test_an_aborted_push_says_why() -> None:
    push = {**PUSH, "outcome": "ABORT", "reason": "ws-inference-1 died", "phases": {}}
    assert views.trace(_resource(lastPush=push)).splitlines()[:2] == [
        "version 42 (epoch 1, step 41): ABORT",
        "  ws-inference-1 died",
    ]


def test_verify_names_each_proof_and_what_is_not_proved() -> None:
    proved, text = views.verify(_resource())
    assert not proved
    assert text.splitlines() == [
        "ok  the status is about the spec as it stands",
        "ok  every engine measured the last push: version 42, digest ab12",
        "NOT every engine holds the committed version: 1 of 2 engines do not hold version 42",
        "ok  the fabric was used: used tcp",
    ]
    synced = [{"type": t, "status": "True", "reason": "R"} for t in ("Synced", "TransportVerified")]
    assert views.verify(_resource(conditions=synced))[0]
    assert not views.verify(_resource(conditions=synced, observedGeneration=1))[0], "a status about an older spec"
    assert not views.verify(_resource(conditions=synced, lastPush=None))[0]


@pytest.fixture
def reader(kube: Kube, tmp_path: Path) -> Path:
    """A kubeconfig of an account that may read what the plug-in reads in this namespace, and no Secret."""
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{kube.namespace}"
    kube.request("POST", kube.path("serviceaccounts"), {"metadata": {"name": "reader"}})
    kinds = {
        "": ["configmaps", "services", "serviceaccounts", "pods"], "apps": ["deployments", "statefulsets", "controllerrevisions"],
        "batch": ["jobs"], "policy": ["poddisruptionbudgets"], "weightsync.dev": [PLURAL],
    }  # fmt: skip
    rules = [{"apiGroups": [group], "resources": names, "verbs": ["get", "list"]} for group, names in kinds.items()]
    kube.request("POST", f"{rbac}/roles", {"metadata": {"name": "reader"}, "rules": rules})
    binding = {
        "metadata": {"name": "reader"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
        "subjects": [{"kind": "ServiceAccount", "name": "reader", "namespace": kube.namespace}],
    }
    kube.request("POST", f"{rbac}/rolebindings", binding)
    path = kube.server.write_kubeconfig(
        tmp_path / "kubeconfig", kube.server.service_account_token(kube.namespace, "reader")
    )
    config = json.loads(path.read_text())
    config["contexts"][0]["context"]["namespace"] = kube.namespace
    path.write_text(json.dumps(config))
    return path


def _run(kubeconfig: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--kubeconfig", str(kubeconfig)])


def test_it_reads_a_real_resource_in_the_contexts_namespace_with_a_readers_rights(kube: Kube, reader: Path) -> None:
    made = kube.create({"model": {"hostPath": "/m"}, "trainer": {"command": ["x"]}})
    owner = {
        "apiVersion": API_VERSION,
        "kind": "WeightSync",
        "name": "ws",
        "uid": made["metadata"]["uid"],
        "controller": True,
    }
    labels = {"app.kubernetes.io/managed-by": "weightsync", "app.kubernetes.io/instance": "ws"}
    service = {
        "metadata": {"name": "ws-mx", "labels": labels, "ownerReferences": [owner]},
        "spec": {"ports": [{"port": 1}]},
    }
    kube.request("POST", kube.path("services"), service)
    kube.patch(PLURAL, "ws", {"status": {"version": {"committed": 3}}}, status=True)

    shown = _run(reader, "status", "ws")
    assert shown.exit_code == 0, shown.output
    assert f"WeightSync {kube.namespace}/ws: version 3, 0 of 1 engines hold it" in shown.output
    assert "└─ Service ws-mx" in shown.output
    assert _run(reader, "versions", "ws").output.startswith("published 0, committed 3")
    assert _run(reader, "trace", "ws").output == "no push has ended yet\n"
    verified = _run(reader, "verify", "ws")
    assert (verified.exit_code, verified.output.splitlines()[1][:3]) == (1, "NOT")


def test_what_cannot_be_read_is_one_line(kube: Kube, reader: Path, tmp_path: Path) -> None:
    assert (
        _run(reader, "status", "none").output == f"Error: there is no WeightSync none in namespace {kube.namespace}\n"
    )
    forbidden = _run(reader, "status", "ws", "--namespace", "default")
    assert forbidden.exit_code == 1
    assert "403" in forbidden.output
    missing = _run(tmp_path / "none", "status", "ws")
    assert (missing.exit_code, missing.output.count("\n")) == (1, 1)


def test_logs_are_kubectls_with_the_roles_selector(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda _, command: ran.append(command))
    CliRunner().invoke(main, ["logs", "ws", "mx", "-n", "team", "--tail", "5", "-f"])
    (command,) = ran
    assert command[:4] == ["kubectl", "--namespace=team", "logs", "--prefix"]
    assert "app.kubernetes.io/instance=ws,app.kubernetes.io/component=modelexpress" in command
    assert {"--tail=5", "--follow"} <= set(command)
