"""The operator as a process, with the chart's rights, on a real API server; a kubelet is played where one would speak."""

from __future__ import annotations

from typing import Any

import pytest

from tests.controlplane.builders import KEY, MINIMAL, make_push, merged
from tests.controlplane.kube import Kube, Kubelet, wait_until
from tests.fixtures.servers import RedisServer
from weightsync.wire import Keys, ReplicaStatus
from weightsync_operator.api.names import LABEL_SESSION, PLURAL, Component
from weightsync_operator.plan.build.auth import access_list, derive_passwords

pytestmark = pytest.mark.usefixtures("operator")

TWO = merged(MINIMAL, {"trainer": {"nodes": 2}, "inference": {"replicas": 2}})
CHILD_KINDS = (
    "pods", "services", "configmaps", "secrets", "serviceaccounts", "deployments", "statefulsets", "controllerrevisions",
    "jobs", "poddisruptionbudgets", "networkpolicies",
)  # fmt: skip


def _bring_up(kube: Kube, kubelet: Kubelet, spec: dict[str, Any] | None = None) -> None:
    """A resource with everything made and Redis and ModelExpress up."""
    kube.create(spec or TWO)
    kubelet.answer_preflight()
    kubelet.make_ready(Component.REDIS, Component.MODEL_EXPRESS)


def _wait_for_gang(kube: Kube, kubelet: Kubelet, epoch: int) -> list[dict[str, Any]]:
    wait_until(f"epoch {epoch} runs", lambda: _trainer(kube), lambda t: (t["epoch"], t["state"]) == (epoch, "Running"))
    return kubelet.wait_for(Component.TRAINER, 2)


def _trainer(kube: Kube) -> dict[str, Any]:
    return kube.status().get("trainer", {"epoch": 0, "state": ""})


def _names(kube: Kube, kind: str) -> set[str]:
    return set(kube.list(kind))


def _wait_condition(kube: Kube, type_: str, status: str, reason: str) -> str:
    """The message of a condition once it has this status and reason."""
    return wait_until(f"{type_}={status}/{reason}", lambda: kube.condition(type_), lambda c: c[:2] == (status, reason))[
        2
    ]


def test_all_children_appear_in_their_order(kube: Kube, kubelet: Kubelet) -> None:
    """1 before the verdict only the question; 2 after it everything but the gang; 3 the gang when Redis and MX are up."""
    kube.create(TWO)
    kubelet.wait_for(Component.PREFLIGHT, 1)
    made = {kind: _names(kube, kind) for kind in CHILD_KINDS if kind != "pods"}
    assert {kind: names for kind, names in made.items() if names} == {}

    kubelet.answer_preflight()
    kubelet.wait_for(Component.INFERENCE, 2)
    assert _names(kube, "services") == {"ws-redis", "ws-mx", "ws-trainer", "ws-engines", "ws-inference"}
    assert _names(kube, "deployments") == {"ws-redis", "ws-mx"}
    assert _names(kube, "secrets") == {"ws-auth"}
    assert _names(kube, "networkpolicies") == {"ws-redis", "ws-mx", "ws-trainer", "ws-inference"}
    assert _names(kube, "jobs") == set()
    wait_until("the question is taken away", lambda: kubelet.pods(Component.PREFLIGHT), lambda pods: pods == [])

    kubelet.make_ready(Component.REDIS, Component.MODEL_EXPRESS)
    _wait_for_gang(kube, kubelet, 1)
    assert _names(kube, "jobs") == {"ws-trainer-1"}
    kubelet.make_ready(Component.INFERENCE)
    _wait_condition(kube, "Available", "True", "EnginesReady")


@pytest.mark.failure_mode(37)
def test_what_is_deleted_or_edited_by_hand_comes_back(kube: Kube, kubelet: Kubelet) -> None:
    _bring_up(kube, kubelet)
    kubelet.wait_for(Component.INFERENCE, 2)
    kube.delete("services", "ws-mx")
    kube.delete("networkpolicies", "ws-redis")
    anyone = [{"op": "add", "path": "/spec/ingress/-", "value": {}}]
    kube.patch("networkpolicies", "ws-mx", anyone)
    kube.patch("deployments", "ws-redis", {"spec": {"replicas": 3}, "metadata": {"annotations": {"theirs": "kept"}}})
    image = [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "evil"}]
    kube.patch("statefulsets", "ws-inference", image)

    wait_until("the policy is back", lambda: _names(kube, "networkpolicies"), lambda names: "ws-redis" in names)
    wait_until(
        "ModelExpress is closed again",
        lambda: kube.list("networkpolicies")["ws-mx"]["spec"]["ingress"],
        lambda rules: {} not in rules,
    )
    wait_until("the Service is back", lambda: _names(kube, "services"), lambda names: "ws-mx" in names)
    wait_until("Redis is one again", lambda: kube.list("deployments")["ws-redis"]["spec"]["replicas"], lambda n: n == 1)
    assert kube.list("deployments")["ws-redis"]["metadata"]["annotations"]["theirs"] == "kept"
    wait_until(
        "the image is back",
        lambda: kube.list("statefulsets")["ws-inference"]["spec"]["template"]["spec"]["containers"][0]["image"],
        lambda value: value == "test/runtime:1",
    )


@pytest.mark.failure_mode(51)
def test_scaling_reaches_the_fleet_and_leaves_session_and_gang_alone(kube: Kube, kubelet: Kubelet) -> None:
    _bring_up(kube, kubelet)
    (first, _) = _wait_for_gang(kube, kubelet, 1)
    done = kube.kubectl("scale", "weightsync", "ws", "--replicas=3")
    assert done.returncode == 0, done.stderr
    engines = kubelet.wait_for(Component.INFERENCE, 3)
    assert {pod["metadata"]["labels"][LABEL_SESSION] for pod in engines} == {first["metadata"]["labels"][LABEL_SESSION]}
    assert _trainer(kube)["epoch"] == 1
    assert len(_names(kube, "configmaps")) == 1


@pytest.mark.failure_mode(62)
def test_when_a_rank_dies_the_whole_gang_is_replaced_after_its_last_pod_is_gone(kube: Kube, kubelet: Kubelet) -> None:
    """1 a rank fails; 2 its peer lingers on a node: no new epoch; 3 the peer is gone: epoch 2, one restart counted."""
    _bring_up(kube, kubelet)
    dead, peer = _wait_for_gang(kube, kubelet, 1)
    kubelet.bind(peer)
    kubelet.end(dead, exit_code=137)
    wait_until("the gang stops", lambda: _trainer(kube), lambda t: t["state"] == "Stopping")
    lingering = wait_until("its peer is told to end", lambda: kube.get("pods", peer["metadata"]["name"]), _is_deleting)
    assert lingering is not None
    assert _trainer(kube)["epoch"] == 1
    kubelet.let_go(peer)
    _wait_for_gang(kube, kubelet, 2)
    assert _trainer(kube)["restarts"] == 1
    assert _names(kube, "jobs") == {"ws-trainer-2"}


def _is_deleting(pod: dict[str, Any] | None) -> bool:
    return pod is not None and "deletionTimestamp" in pod["metadata"]


@pytest.mark.failure_mode(43)
def test_a_spent_restart_budget_is_failed_and_holds_no_pods(kube: Kube, kubelet: Kubelet) -> None:
    _bring_up(kube, kubelet, merged(TWO, {"trainer": {"restarts": 0}}))
    dead, _ = _wait_for_gang(kube, kubelet, 1)
    kubelet.end(dead, exit_code=1)
    message = _wait_condition(kube, "Failed", "True", "RestartBudgetSpent")
    assert f"{dead['metadata']['name']} exited with 1" in message
    assert _trainer(kube)["epoch"] == 1


@pytest.mark.failure_mode(63)
def test_a_complete_trainer_never_trains_again(kube: Kube, kubelet: Kubelet) -> None:
    _bring_up(kube, kubelet)
    for pod in _wait_for_gang(kube, kubelet, 1):
        kubelet.end(pod, exit_code=0)
    _wait_condition(kube, "Complete", "True", "TrainerSucceeded")
    kube.delete("jobs", "ws-trainer-1", propagationPolicy="Background")
    kube.patch(PLURAL, "ws", {"spec": {"suspend": True}})
    _wait_condition(kube, "Suspended", "True", "Suspended")
    kube.patch(PLURAL, "ws", {"spec": {"suspend": False}})
    kubelet.wait_for(Component.INFERENCE, 2)
    assert (_names(kube, "jobs"), _trainer(kube)["epoch"]) == (set(), 1)


@pytest.mark.failure_mode(42)
def test_suspend_takes_both_halves_away_and_resume_brings_both_back(kube: Kube, kubelet: Kubelet) -> None:
    _bring_up(kube, kubelet)
    _wait_for_gang(kube, kubelet, 1)
    kube.patch(PLURAL, "ws", {"spec": {"suspend": True}})
    _wait_condition(kube, "Suspended", "True", "Suspended")
    assert kubelet.pods(Component.TRAINER) == []
    assert kubelet.pods(Component.INFERENCE) == []
    assert len(kubelet.pods(Component.REDIS)) == 1, "the ledger stays"
    kube.patch(PLURAL, "ws", {"spec": {"suspend": False}})
    _wait_for_gang(kube, kubelet, 2)
    kubelet.wait_for(Component.INFERENCE, 2)


@pytest.mark.failure_mode(37)
@pytest.mark.failure_mode(46)
def test_a_changed_spec_reaches_gang_and_engines_within_the_budget(kube: Kube, kubelet: Kubelet) -> None:
    """1 another model is another session; 2 a new epoch; 3 engines go one at a time; 4 the old contract goes last."""
    _bring_up(kube, kubelet)
    _wait_for_gang(kube, kubelet, 1)
    kubelet.make_ready(Component.INFERENCE)
    old = kubelet.pods(Component.INFERENCE)[0]["metadata"]["labels"][LABEL_SESSION]
    (contract,) = _names(kube, "configmaps")
    kube.patch(PLURAL, "ws", {"spec": {"model": {"hostPath": "/models/other"}}})
    kubelet.answer_preflight()
    _wait_for_gang(kube, kubelet, 2)
    for replaced in (1, 2):
        wait_until(
            f"{replaced} engines replaced",
            lambda: _sessions(kubelet),
            lambda s, n=replaced: s.count(old) == 2 - n and len(s) == 2,
        )
        kubelet.make_ready(Component.INFERENCE)
    wait_until(
        "the old contract is gone",
        lambda: _names(kube, "configmaps"),
        lambda names: len(names) == 1 and contract not in names,
    )


def _sessions(kubelet: Kubelet) -> list[str]:
    return [pod["metadata"]["labels"][LABEL_SESSION] for pod in kubelet.pods(Component.INFERENCE)]


@pytest.mark.failure_mode(65)
def test_a_typo_in_a_pod_template_is_told_with_its_path_and_makes_nothing(kube: Kube, kubelet: Kubelet) -> None:
    kube.create(merged(TWO, {"inference": {"podTemplate": {"spec": {"nodeSelectr": {"a": "b"}}}}}))
    message = _wait_condition(kube, "SpecValid", "False", "SpecInvalid")
    assert message.startswith("spec.inference.podTemplate.spec.nodeSelectr: field not declared in schema")
    told = wait_until(
        "an event", lambda: kube.request("GET", f"/api/v1/namespaces/{kube.namespace}/events")["items"], bool
    )
    assert [(event["type"], event["reason"], event["message"]) for event in told] == [
        ("Warning", "SpecInvalid", message)
    ]
    assert {kind: _names(kube, kind) for kind in CHILD_KINDS if _names(kube, kind)} == {}
    kube.patch(PLURAL, "ws", {"spec": {"inference": {"podTemplate": {"spec": {"nodeSelectr": None}}}}})
    kubelet.answer_preflight()
    _wait_condition(kube, "SpecValid", "True", "Valid")


def test_a_pod_template_that_the_api_server_refuses_is_told(kube: Kube) -> None:
    bad = {
        "spec": {
            "containers": [{"name": "trainer", "env": [{"name": "A", "value": "1"}, {"name": "A-B=C", "value": "1"}]}]
        }
    }
    kube.create(merged(TWO, {"trainer": {"podTemplate": bad}, "inference": {"replicas": 1}}))
    kube.create(merged(TWO, {"trainer": {"podTemplate": {"spec": {"$patch": "replace"}}}}), name="directive")
    wait_until("refused", lambda: kube.condition("SpecValid", "directive"), lambda c: c[0] == "False")
    assert kube.condition("SpecValid", "directive")[2].startswith("spec.trainer.podTemplate.spec.$patch")
    message = _wait_condition(kube, "SpecValid", "False", "SpecInvalid")
    assert message.startswith("spec.trainer.podTemplate.spec.containers[0].env")


def test_a_model_that_does_not_fit_is_told_by_its_field_and_nothing_else_is_made(kube: Kube, kubelet: Kubelet) -> None:
    kube.create(TWO)
    fault = {"field": "spec.inference.parallelism.tp", "message": "9 heads are not divisible by tp 2"}
    kubelet.answer_preflight({"ok": False, "errors": [fault]})
    assert _wait_condition(kube, "SpecValid", "False", "PreflightFailed") == f"{fault['field']}: {fault['message']}"
    wait_until("the question is taken away", lambda: kubelet.pods(Component.PREFLIGHT), lambda pods: pods == [])
    assert {kind: _names(kube, kind) for kind in CHILD_KINDS if _names(kube, kind)} == {}


def test_a_missing_model_folder_is_told_by_the_kubelets_words(kube: Kube, kubelet: Kubelet) -> None:
    kube.create(TWO)
    (pod,) = kubelet.wait_for(Component.PREFLIGHT, 1)
    words = "hostPath type check failed: /models/tiny is not a directory"
    about = {"kind": "Pod", "name": pod["metadata"]["name"], "namespace": kube.namespace, "uid": pod["metadata"]["uid"]}
    event = {
        "metadata": {"name": "mount"},
        "involvedObject": about,
        "reason": "FailedMount",
        "message": words,
        "type": "Warning",
    }
    kube.request("POST", f"/api/v1/namespaces/{kube.namespace}/events", event)
    assert _wait_condition(kube, "SpecValid", "False", "ModelMissing") == f"spec.model.hostPath: {words}"


@pytest.mark.failure_mode(45)
@pytest.mark.failure_mode(38)
@pytest.mark.failure_mode(64)
def test_deleting_the_resource_leaves_nothing_and_waits_for_nobody(kube: Kube, kubelet: Kubelet) -> None:
    _bring_up(kube, kubelet)
    _wait_for_gang(kube, kubelet, 1)
    resource = kube.get(PLURAL, "ws")
    assert resource is not None
    assert "finalizers" not in resource["metadata"]
    assert not any("kopf" in name for name in resource["metadata"].get("annotations", {}))
    kube.delete(PLURAL, "ws")
    assert kube.get(PLURAL, "ws") is None, "no finalizer holds it"
    for kind in CHILD_KINDS:
        wait_until(f"no {kind}", lambda k=kind: _names(kube, k), lambda names: names == set())


def test_somebody_elses_object_is_left_alone(kube: Kube, kubelet: Kubelet) -> None:
    theirs = {"metadata": {"name": "ws-redis"}, "spec": {"ports": [{"port": 1}]}}
    kube.request("POST", kube.path("services"), theirs)
    kube.create(TWO)
    kubelet.answer_preflight()
    assert "Service ws-redis" in _wait_condition(kube, "Degraded", "True", "NameTaken")
    service = kube.get("services", "ws-redis")
    assert service is not None
    assert service["spec"]["ports"][0]["port"] == 1
    assert "ownerReferences" not in service["metadata"]
    kube.delete("services", "ws-redis")
    _wait_condition(kube, "Degraded", "False", "Healthy")
    assert "ws-redis" in _names(kube, "services")


def test_a_resource_made_again_under_its_name_gets_children_of_its_own(kube: Kube, kubelet: Kubelet) -> None:
    _bring_up(kube, kubelet)
    _wait_for_gang(kube, kubelet, 1)
    first = kube.get("secrets", "ws-auth")
    kube.delete(PLURAL, "ws")
    again = kube.create(TWO)
    kubelet.answer_preflight()

    def owners() -> set[str]:
        children = [child for kind in ("services", "secrets", "statefulsets") for child in kube.list(kind).values()]
        return {child["metadata"]["ownerReferences"][0]["uid"] for child in children}

    wait_until("only new children", owners, lambda uids: uids == {again["metadata"]["uid"]})
    second = kube.get("secrets", "ws-auth")
    assert first is not None
    assert second is not None
    assert first["data"] != second["data"]


def test_what_the_ledger_says_is_in_the_status(kube: Kube, kubelet: Kubelet, ledger: RedisServer) -> None:
    """The operator reads with a user that can read this resource's ledger and nothing more."""
    _bring_up(kube, kubelet)
    kubelet.wait_for(Component.INFERENCE, 2)
    kubelet.make_ready(Component.INFERENCE)
    resource = kube.get(PLURAL, "ws")
    assert resource is not None
    session = kubelet.pods(Component.INFERENCE)[0]["metadata"]["labels"][LABEL_SESSION]
    _allow_operator(ledger, resource["metadata"]["uid"])
    _fill(ledger, session, version=42, held=(42, 41))
    assert "ws-inference-1" in _wait_condition(kube, "Synced", "False", "Behind")
    _fill(ledger, session, version=42, held=(42, 42))
    _wait_condition(kube, "Synced", "True", "InSync")
    _wait_condition(kube, "TransportVerified", "True", "ExpectedTransport")
    status = kube.status()
    assert status["version"] == {"published": 42, "committed": 42, "session": session}
    assert status["lastPush"]["GBps"] == 1.23
    assert status["lastPush"]["throughput"] == "1.23 GB/s"
    row = kube.kubectl("get", "ws", "--no-headers").stdout.split()
    assert row[:5] == ["ws", "ws", "tcp", "42", "True"]


def _allow_operator(ledger: RedisServer, uid: str) -> None:
    """Give the shared Redis of these tests the operator's user of one resource."""
    line = next(
        line for line in access_list(derive_passwords(KEY, uid)).splitlines() if line.startswith("user operator")
    )
    ledger.client().execute_command("ACL", "SETUSER", "operator", "reset", *line.split()[2:])


def _fill(ledger: RedisServer, session: str, *, version: int, held: tuple[int, ...]) -> None:
    redis, keys = ledger.client(), Keys(session)
    redis.hset(keys.head, mapping={"epoch": 1, "version": version, "version_epoch": 1, "published": version})
    for i, own in enumerate(held):
        name = f"ws-inference-{i}"
        record = ReplicaStatus(name=name, version=own, epoch=1, state="CLEAN", serving=own == version, reason="behind")
        redis.hset(keys.replicas, name, record.to_json())
        redis.set(keys.replica_lease(name), "1", ex=600)
    redis.lpush(keys.pushes, make_push(version).to_json())


@pytest.mark.parametrize(
    "question",
    [
        ("list", "secrets"),
        ("watch", "secrets"),
        ("delete", "secrets"),
        ("create", "pods", "--subresource=exec"),
        ("create", "clusterroles"),
        ("delete", "namespaces"),
    ],
)
def test_the_operator_may_do_no_more_than_it_must(kube: Kube, question: tuple[str, ...]) -> None:
    done = kube.kubectl("auth", "can-i", *question, "--as=system:serviceaccount:weightsync-system:ws-operator")
    assert done.stdout.strip() == "no"


def test_the_operators_words_about_a_refusal_reach_the_status(kube: Kube, kubelet: Kubelet) -> None:
    """A quota is no fault of the spec: it is told, and tried again until it gives way."""
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"services": "0"}}}
    path = f"/api/v1/namespaces/{kube.namespace}/resourcequotas"
    kube.request("POST", path, quota)
    wait_until("the quota counts", lambda: kube.request("GET", f"{path}/none").get("status", {}), lambda s: "used" in s)
    kube.create(TWO)
    try:
        message = _wait_condition(kube, "Degraded", "True", "ApplyRefused")
        assert "exceeded quota" in message
    finally:
        kube.request("DELETE", f"{path}/none")
    kubelet.answer_preflight()
    _wait_condition(kube, "Degraded", "False", "Healthy")
