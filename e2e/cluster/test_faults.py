"""The example in a real cluster, and what may happen to it. One fleet, tests in order; each leaves it healthy for the next."""

from __future__ import annotations

import pytest

from e2e.cluster.conftest import ENGINE_START_S, NAME, PUSHER, Resource, wait_for
from e2e.cluster.stream import Stream, stale, unanswered

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def test_versions_reach_every_engine(resource: Resource) -> None:
    status = resource.wait_in_sync(above=1, timeout_s=2 * ENGINE_START_S)
    assert status["lastPush"]["outcome"] == "COMMIT"
    assert status["trainer"]["epoch"] == 1
    states = [resource.engine_state(pod["metadata"]["name"]) for pod in resource.engines()]
    assert len(states) == 2
    assert all(state["serving"] for state in states)


@pytest.mark.failure_mode(22)
@pytest.mark.failure_mode(62)
def test_a_trainer_rank_killed_in_the_middle_of_a_push_restarts_the_gang(resource: Resource) -> None:
    """1. an engine is frozen, so that a push hangs in the middle; 2. rank 1 is killed from the node, the engine thaws;
    3. no engine serves a version that was not committed; 4. the gang comes back as epoch 2 and pushes on.
    """
    before = resource.committed
    frozen = resource.engines()[0]["metadata"]["name"]
    freeze = {"namespace": resource.kubectl_namespace, "pod": frozen, "container": "engine"}
    resource.provider.signal_container(**freeze, signal_name="STOP")
    published = wait_for(
        "a push that cannot end", lambda: (p := resource.status["version"]["published"]) > resource.committed and p, 120
    )
    rank = resource.trainer_pod(1)
    resource.kill(rank, "trainer")
    resource.provider.signal_container(**freeze, signal_name="CONT")
    told = wait_for("an event says what happened", lambda: resource.events("TrainerRestarting"), 120)
    assert any(f"{rank} exited with 137" in message for message in told), told
    status = resource.wait_in_sync(above=max(before, published), timeout_s=2 * ENGINE_START_S)
    assert status["trainer"]["epoch"] == 2
    assert status["lastPush"]["outcome"] == "COMMIT"


@pytest.mark.failure_mode(28)
def test_a_killed_engine_comes_back_and_is_caught_up(resource: Resource) -> None:
    before = resource.committed
    resource.kill(resource.engines()[0]["metadata"]["name"], "engine")
    wait_for("the replica is out", lambda: resource.status["inference"]["ready"] < 2, 60)
    resource.wait_in_sync(above=before)


@pytest.mark.failure_mode(28)
def test_all_engines_killed_at_once_come_back_and_are_caught_up(resource: Resource) -> None:
    """Nobody is left that serves, no peer and no member of the next push: the trainer waits for them, and no new epoch begins."""
    before = resource.status
    for pod in resource.engines():
        resource.kill(pod["metadata"]["name"], "engine")
    wait_for("no replica is ready", lambda: resource.status["inference"]["ready"] == 0, 60)
    status = resource.wait_in_sync(above=before["version"]["committed"], timeout_s=2 * ENGINE_START_S)
    assert status["trainer"]["epoch"] == before["trainer"]["epoch"]


@pytest.mark.failure_mode(30)
@pytest.mark.parametrize("component", ["redis", "modelexpress"])
def test_the_rendezvous_dies_and_pushes_go_on(resource: Resource, component: str) -> None:
    before = resource.committed
    pod = resource.component_pod(component)
    resource.kill(pod["metadata"]["name"], pod["spec"]["containers"][0]["name"])
    resource.wait_in_sync(above=before)


@pytest.mark.failure_mode(51)
def test_a_replica_that_scaling_adds_serves_only_once_it_is_current(resource: Resource) -> None:
    before = resource.status
    resource.kubectl.run("scale", "weightsync", NAME, "--replicas=3")
    newcomer = f"{NAME}-inference-2"

    def first_ready() -> dict | None:
        pod = next((p for p in resource.engines() if p["metadata"]["name"] == newcomer), None)
        conditions = (pod or {}).get("status", {}).get("conditions", [])
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
        return resource.engine_state(newcomer) if ready else None

    state = wait_for("the newcomer is ready", first_ready, 2 * ENGINE_START_S)
    assert state["version"] >= before["version"]["committed"] > 0
    assert resource.status["trainer"]["epoch"] == before["trainer"]["epoch"]
    resource.kubectl.run("scale", "weightsync", NAME, "--replicas=2")
    resource.wait_in_sync(above=resource.committed)


@pytest.mark.failure_mode(46)
def test_a_new_engine_image_rolls_out_under_requests_and_pushes(resource: Resource, stream: Stream) -> None:
    """1. the image is changed while a client asks and the trainer pushes; 2. engines are replaced one at a time, and the trainer is
    not; 3. every request was answered, if not at once then after a retry, and none by weights older than an answer before it.
    """
    before = resource.status
    (old,) = resource.engine_images()
    new = resource.another_name_of(old)
    stream.wait_answers(3)
    resource.change_spec(inference={"image": new})
    seen: set[frozenset[str]] = set()

    def rolled_out() -> bool:
        assert resource.status["inference"]["ready"] >= 1
        seen.add(resource.engine_images())
        return resource.engine_images() == {new} and len(resource.engines()) == 2

    wait_for("both engines have the new image", rolled_out, 4 * ENGINE_START_S)
    status = resource.wait_in_sync(above=resource.committed, timeout_s=2 * ENGINE_START_S)
    stream.wait_answers(3)
    tries = stream.tries()
    assert frozenset({old, new}) in seen
    assert status["trainer"]["epoch"] == before["trainer"]["epoch"], resource.events("TrainerRestarting")
    assert status["version"]["committed"] > before["version"]["committed"] + 1
    assert len({version for t in tries for version in t.versions}) > 1
    assert unanswered(tries) == []
    assert stale(tries) == []


@pytest.mark.failure_mode(42)
def test_suspend_frees_everything_and_resume_comes_back_by_itself(resource: Resource) -> None:
    before = resource.status
    resource.suspend(True)
    wait_for("no engine and no trainer is left", lambda: not resource.engines() and not resource.trainer_pods(), 120)
    assert resource.condition("Suspended")["status"] == "True"
    resource.suspend(False)
    status = resource.wait_in_sync(above=before["version"]["committed"], timeout_s=2 * ENGINE_START_S)
    assert status["trainer"]["epoch"] > before["trainer"]["epoch"]


@pytest.mark.failure_mode(28)
@pytest.mark.failure_mode(61)
def test_after_training_an_engine_that_is_deleted_becomes_current_from_its_peer(resource: Resource) -> None:
    """1. a trainer that pushes twice ends with success; 2. an engine's pod is deleted; 3. its successor is ready with the committed
    version, byte for byte its peer's, and no epoch began; 4. the status says who repaired whom, and is in sync.
    """
    before = resource.committed
    resource.change_spec(trainer={"args": ["/models/smollm2", "2"]})
    wait_for(
        "the trainer is complete", lambda: resource.condition("Complete").get("status") == "True", 2 * ENGINE_START_S
    )
    ended = resource.wait_in_sync(above=before)
    deleted, peer = (pod["metadata"] for pod in resource.engines())
    resource.kubectl.delete("pod", deleted["name"])

    def successor_is_ready() -> bool:
        pods = [pod for pod in resource.engines() if pod["metadata"]["name"] == deleted["name"]]
        conditions = pods[0].get("status", {}).get("conditions", []) if pods else []
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
        return ready and pods[0]["metadata"]["uid"] != deleted["uid"]

    wait_for("the successor is ready", successor_is_ready, 2 * ENGINE_START_S)
    late, healthy = resource.engine_state(deleted["name"]), resource.engine_state(peer["name"])
    assert late["version"] == ended["version"]["committed"] > 0
    assert late["digest"] == healthy["digest"]
    wait_for("the status names the peer", lambda: resource.status["lastPush"].get("source") == peer["name"], 60)
    status = resource.wait_in_sync(above=before)
    assert (status["trainer"]["epoch"], status["version"]) == (ended["trainer"]["epoch"], ended["version"])


@pytest.mark.failure_mode(61)
def test_after_training_a_fleet_that_lost_its_version_is_restored_from_a_checkpoint(resource: Resource) -> None:
    """1. a checkpoint is named, which restarts nothing; 2. all engines are deleted at once, and with them the last version; 3. a
    pod pushes the newest checkpoint as the next version, in an epoch of its own; 4. both engines answer with the same bytes, the
    trainer stays complete, and the Job goes.
    """
    of_role = f"app.kubernetes.io/instance={NAME},app.kubernetes.io/component="
    ended = resource.wait_in_sync(above=0)
    engines = {pod["metadata"]["uid"] for pod in resource.engines()}
    resource.change_spec(transfer={"checkpoint": {"hostPath": "/var/lib/weightsync/models"}})
    wait_for("the spec is in force", lambda: resource.status["revision"] != ended["revision"], 120)
    assert {pod["metadata"]["uid"] for pod in resource.engines()} == engines
    resource.kubectl.run("delete", "pods", "-l", f"{of_role}inference", "--grace-period=0", "--force")
    status = resource.wait_in_sync(above=ended["version"]["committed"], timeout_s=3 * ENGINE_START_S)
    assert status["lastPush"]["epoch"] > ended["lastPush"]["epoch"]
    assert (status["lastPush"]["step"], status["lastPush"]["digestOk"]) == (2, True), "the step is the folder's number"
    assert status["trainer"] == ended["trainer"]
    assert len({resource.engine_state(pod["metadata"]["name"])["digest"] for pod in resource.engines()}) == 1
    wait_for("the Job is gone", lambda: not resource.kubectl.list("jobs", f"{of_role}restore"), 120)


@pytest.mark.failure_mode(45)
def test_deleting_the_resource_leaves_nothing(resource: Resource) -> None:
    resource.kubectl.delete("weightsync", NAME)
    kinds = "pods,jobs,statefulsets,deployments,services,secrets,configmaps,poddisruptionbudgets,serviceaccounts"
    kinds += ",controllerrevisions,persistentvolumeclaims,networkpolicies"

    def left() -> list[str]:
        names = resource.kubectl.run("get", kinds, "-o", "name").split()
        ours = {"configmap/kube-root-ca.crt", "serviceaccount/default", f"configmap/{PUSHER.stem}"}
        return sorted(set(names) - ours)

    wait_for("nothing is left", lambda: not left() or None, 180)
    assert left() == []
