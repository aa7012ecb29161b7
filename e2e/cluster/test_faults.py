"""The example in a real cluster, and what may happen to it. One fleet, tests in order; each leaves it healthy for the next."""

from __future__ import annotations

import pytest

from e2e.cluster.conftest import ENGINE_START_S, NAME, PUSHER, Resource, wait_for

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
    reason = wait_for("the status says what happened", lambda: resource.told_abort(), 120)
    assert "rank" in reason or "replica" in reason or "lease" in reason, reason
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


@pytest.mark.failure_mode(42)
def test_suspend_frees_everything_and_resume_comes_back_by_itself(resource: Resource) -> None:
    before = resource.status
    resource.suspend(True)
    wait_for("no engine and no trainer is left", lambda: not resource.engines() and not resource.trainer_pods(), 120)
    assert resource.condition("Suspended")["status"] == "True"
    resource.suspend(False)
    status = resource.wait_in_sync(above=before["version"]["committed"], timeout_s=2 * ENGINE_START_S)
    assert status["trainer"]["epoch"] > before["trainer"]["epoch"]


@pytest.mark.failure_mode(45)
def test_deleting_the_resource_leaves_nothing(resource: Resource) -> None:
    resource.kubectl.delete("weightsync", NAME)
    kinds = "pods,jobs,statefulsets,deployments,services,secrets,configmaps,poddisruptionbudgets,serviceaccounts"
    kinds += ",controllerrevisions,persistentvolumeclaims"

    def left() -> list[str]:
        names = resource.kubectl.run("get", kinds, "-o", "name").split()
        ours = {"configmap/kube-root-ca.crt", "serviceaccount/default", f"configmap/{PUSHER.stem}"}
        return sorted(set(names) - ours)

    wait_for("nothing is left", lambda: not left() or None, 180)
    assert left() == []
