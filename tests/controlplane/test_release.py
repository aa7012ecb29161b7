"""A resource with keys in an external Redis is let go after they are deleted, and at a deadline in any case."""

from __future__ import annotations

import asyncio
import base64
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis

from tests.controlplane.builders import MINIMAL, NOW, make_context, make_pod, make_seen, make_spec, merged
from tests.controlplane.kube import Kube, Kubelet, wait_until
from tests.controlplane.passes import DrivenOperator, drive
from tests.fixtures.servers import RedisServer
from weightsync_operator.api.names import FINALIZER, LABEL_SESSION, PLURAL, Component
from weightsync_operator.plan import release
from weightsync_operator.plan.observed import Seen, timestamp
from weightsync_operator.plan.release import finalizer_patch, step_release, wants_finalizer
from weightsync_operator.release import Releaser

PASSWORD = "p@ss:w/rd %?#"
EXTERNAL = {"address": "redis:6379", "secretRef": {"name": "theirs"}}
NOTES = Path(__file__).parents[2] / "charts/weightsync/templates/NOTES.txt"


def _deleted(*children: dict[str, Any], ago_s: float = 0.0) -> Seen:
    seen = make_seen(make_context(), *children)
    seen.resource["metadata"] |= {"deletionTimestamp": timestamp(NOW - ago_s), "finalizers": [FINALIZER]}
    return seen


def _set() -> dict[str, Any]:
    labels = make_context().labels(Component.INFERENCE)
    return {"kind": "StatefulSet", "metadata": {"name": "ws-inference", "uid": "set", "labels": labels}}


def test_only_an_external_ledger_that_is_not_to_be_kept_needs_a_finalizer() -> None:
    assert not wants_finalizer(make_spec())
    assert wants_finalizer(make_spec(redis={"external": EXTERNAL}))
    assert not wants_finalizer(make_spec(redis={"external": EXTERNAL}, deletionPolicy="Retain"))


def test_a_finalizer_comes_and_goes_beside_those_of_others() -> None:
    theirs = {"metadata": {"resourceVersion": "7", "finalizers": ["foregroundDeletion"]}}
    patch = finalizer_patch(theirs, wanted=True)
    assert patch == {"metadata": {"finalizers": ["foregroundDeletion", FINALIZER], "resourceVersion": "7"}}
    assert finalizer_patch(theirs, wanted=False) is None
    both = {"metadata": {"resourceVersion": "8", "finalizers": ["foregroundDeletion", FINALIZER]}}
    assert finalizer_patch(both, wanted=True) is None
    patch = finalizer_patch(both, wanted=False)
    assert patch is not None
    assert patch["metadata"]["finalizers"] == ["foregroundDeletion"]


def test_engines_and_gang_go_first_and_their_pods_are_waited_for() -> None:
    step = step_release(_deleted(_set(), make_pod("ws-inference-0")), NOW)
    assert [(delete.kind, delete.name, delete.foreground) for delete in step.actions] == [
        ("StatefulSet", "ws-inference", True)
    ]
    assert (step.waits_for, step.overdue) == ("ws-inference, ws-inference-0", False)
    assert step_release(_deleted(), NOW).waits_for == ""


@pytest.mark.failure_mode(38)
def test_the_deadline_counts_from_the_deletion() -> None:
    assert not step_release(_deleted(_set(), ago_s=release.DEADLINE_S - 1), 0).overdue
    assert step_release(_deleted(_set(), ago_s=release.DEADLINE_S), 0).overdue


@pytest.mark.failure_mode(38)
def test_an_operator_that_comes_back_late_gives_pods_the_time_to_end() -> None:
    """Else it would delete the keys beside pods in their grace period, which write them anew."""
    late = _deleted(_set(), ago_s=10 * release.DEADLINE_S)
    assert not step_release(late, NOW - release.RETURN_S + 1).overdue
    assert step_release(late, NOW - release.RETURN_S).overdue


def test_nothing_is_remembered_of_one_whose_finalizer_somebody_else_took() -> None:
    """Another resource of that name is seen for the first time. Seen to fail with the finalizer's patch alone forgetting."""
    first = _deleted(ago_s=1).resource
    first["spec"] = make_spec(redis={"external": EXTERNAL}).model_dump(mode="json", by_alias=True, exclude_none=True)

    async def nothing(*_: Any, **__: Any) -> Any:
        return None

    async def no_children(*_: Any) -> Any:
        return []

    async def play() -> None:
        told: Any = SimpleNamespace(report=nothing, tell=nothing, forget=lambda key: None)
        cluster: Any = SimpleNamespace(list=no_children, get=nothing)
        ledgers: Any = SimpleNamespace(ledger=lambda key: None)
        releaser = Releaser(cluster, ledgers, told)
        assert await releaser.release(first) is not None
        assert len(releaser._first_seen) == 1
        releaser.forget(("ns", "ws"))
        assert releaser._first_seen == {}

    asyncio.run(play())


@pytest.fixture
def locked(redis_server: RedisServer) -> RedisServer:
    """A Redis that wants a password."""
    redis_server.client().config_set("requirepass", PASSWORD)
    return redis_server


def _client(server: RedisServer) -> Redis:
    return Redis(port=server.port, password=PASSWORD, decode_responses=True)


def _spec(port: int) -> dict[str, Any]:
    external = {"address": f"127.0.0.1:{port}", "secretRef": {"name": "theirs"}}
    return merged(MINIMAL, {"redis": {"external": external}})


def _make_secret(kube: Kube) -> None:
    value = base64.b64encode(PASSWORD.encode()).decode()
    kube.request("POST", kube.path("secrets"), {"metadata": {"name": "theirs"}, "data": {"password": value}})


async def _bring_up(operator: DrivenOperator, kube: Kube, kubelet: Kubelet, spec: dict[str, Any]) -> None:
    await asyncio.to_thread(_make_secret, kube)
    await asyncio.to_thread(kube.create, spec)
    await operator.settle()
    await asyncio.to_thread(kubelet.answer_preflight)
    await operator.settle()
    await asyncio.to_thread(kubelet.wait_for, Component.INFERENCE, 1)


async def _until(operator: DrivenOperator, what: str, met: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Passes until it is so."""
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline, f"{what}: not so after {timeout_s:.0f} s"
        await operator.one_pass()
        await asyncio.sleep(0.05)


def _session(kubelet: Kubelet) -> str:
    return kubelet.pods(Component.INFERENCE)[0]["metadata"]["labels"][LABEL_SESSION]


def _is_gone(kube: Kube) -> bool:
    return kube.get(PLURAL, "ws") is None


def _finalizers(kube: Kube) -> list[str]:
    resource = kube.get(PLURAL, "ws")
    return [] if resource is None else resource["metadata"].get("finalizers", [])


@pytest.mark.failure_mode(45)
def test_keys_go_after_the_pods_and_nobody_elses(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path, locked: RedisServer
) -> None:
    """1 held before anything is made; 2 deleted: pods linger, keys stay; 3 pods gone: keys of all its sessions go; 4 so does it."""

    async def play(operator: DrivenOperator) -> None:
        await _bring_up(operator, kube, kubelet, _spec(locked.port))
        assert _finalizers(kube) == [FINALIZER]
        redis, session = _client(locked), _session(kubelet)
        mine = [f"ws:{session}:head", f"ws:{session.split('-')[0]}-older000:pushes"]
        others = ["ws:ffffffffffff-11111111:head", "mx:source", "theirs"]
        for key in [*mine, *others]:
            redis.set(key, "x")
        (engine,) = kubelet.pods(Component.INFERENCE)
        kubelet.bind(engine)
        kube.delete(PLURAL, "ws")

        await _until(operator, "the engine is told to end", lambda: _is_ending(kube, engine))
        for _ in range(5):
            await operator.one_pass()
        assert sorted(redis.keys()) == sorted([*mine, *others])
        assert kube.condition("Progressing")[:2] == ("True", "Releasing")
        assert engine["metadata"]["name"] in kube.condition("Progressing")[2]

        kubelet.let_go(engine)
        await _until(operator, "the resource is gone", lambda: _is_gone(kube))
        assert sorted(redis.keys()) == sorted(others)

    drive(operator_kubeconfig, kube, play)


def _is_ending(kube: Kube, pod: dict[str, Any]) -> bool:
    found = kube.get("pods", pod["metadata"]["name"])
    return found is not None and "deletionTimestamp" in found["metadata"]


@pytest.mark.failure_mode(38)
@pytest.mark.failure_mode(64)
def test_a_redis_that_is_gone_holds_nobody_beyond_the_deadline(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path, locked: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail with the deadline out of reach: the resource stays for ever."""

    async def play(operator: DrivenOperator) -> None:
        await _bring_up(operator, kube, kubelet, _spec(locked.port))
        uid, session = _uid(kube), _session(kubelet)
        locked.kill()
        kube.delete(PLURAL, "ws")
        await _until(operator, "it waits", lambda: "keys ws:" in kube.condition("Progressing")[2])
        assert not _is_gone(kube)
        monkeypatch.setattr(release, "DEADLINE_S", 3.0)
        monkeypatch.setattr(release, "RETURN_S", 3.0)
        await _until(operator, "the resource is gone", lambda: _is_gone(kube))
        (event,) = [event for event in _events(kube, uid) if event["reason"] == "KeysLeft"]
        assert event["type"] == "Warning"
        assert f"keys ws:{session.split('-')[0]}-* at 127.0.0.1:{locked.port}/0" in event["message"]
        assert PASSWORD not in event["message"]

    drive(operator_kubeconfig, kube, play)


def _uid(kube: Kube) -> str:
    resource = kube.get(PLURAL, "ws")
    assert resource is not None
    return resource["metadata"]["uid"]


@pytest.mark.failure_mode(38)
def test_an_operator_with_a_role_alone_sets_no_finalizer(kube: Kube, operator_kubeconfig: Path) -> None:
    """In a namespace that is deleted its Role goes first: nobody could take the finalizer away again."""

    async def play(operator: DrivenOperator) -> None:
        await asyncio.to_thread(_make_secret, kube)
        await asyncio.to_thread(kube.create, _spec(6379))
        await operator.settle()
        assert "finalizers" not in kube.get(PLURAL, "ws")["metadata"]

    drive(operator_kubeconfig, kube, play, namespaces=(kube.namespace,))


def _events(kube: Kube, uid: str) -> list[dict[str, Any]]:
    query = f"?fieldSelector=involvedObject.uid={uid}"
    return kube.request("GET", f"/api/v1/namespaces/{kube.namespace}/events{query}")["items"]


@pytest.mark.failure_mode(38)
def test_a_namespace_that_is_deleted_goes_and_takes_the_keys_along(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path, locked: RedisServer
) -> None:
    """The Secret goes with the namespace, before or after: what was read while it stood still opens the door."""

    async def play(operator: DrivenOperator) -> None:
        await _bring_up(operator, kube, kubelet, _spec(locked.port))
        redis, session = _client(locked), _session(kubelet)
        redis.set(f"ws:{session}:head", "x")
        kube.delete("secrets", "theirs")
        kube.request("DELETE", f"/api/v1/namespaces/{kube.namespace}")
        await _until(operator, "the resource is gone", lambda: _is_gone(kube))
        assert redis.keys() == []

    drive(operator_kubeconfig, kube, play)
    wait_until("the namespace is gone", lambda: _namespace(kube), lambda found: found is None)


def _namespace(kube: Kube) -> dict[str, Any] | None:
    try:
        return kube.request("GET", f"/api/v1/namespaces/{kube.namespace}")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None


def test_keys_that_are_to_be_retained_hold_nothing(
    kube: Kube, kubelet: Kubelet, operator_kubeconfig: Path, locked: RedisServer
) -> None:
    """1 the policy changes: the finalizer goes; 2 deleted: it is gone at once; 3 its keys stay."""

    async def play(operator: DrivenOperator) -> None:
        await _bring_up(operator, kube, kubelet, _spec(locked.port))
        key = f"ws:{_session(kubelet)}:head"
        _client(locked).set(key, "x")
        kube.patch(PLURAL, "ws", {"spec": {"deletionPolicy": "Retain"}})
        await operator.settle()
        assert _finalizers(kube) == []
        kube.delete(PLURAL, "ws")
        assert _is_gone(kube)
        assert await operator.one_pass() is None
        assert _client(locked).keys() == [key]

    drive(operator_kubeconfig, kube, play)


def test_without_its_secret_nothing_is_made_and_the_field_is_told(
    kube: Kube, operator_kubeconfig: Path, locked: RedisServer
) -> None:
    async def play(operator: DrivenOperator) -> None:
        await asyncio.to_thread(kube.create, _spec(locked.port))
        await operator.settle()
        status, reason, words = kube.condition("SpecValid")
        assert (status, reason) == ("False", "SecretMissing")
        assert "spec.redis.external.secretRef: Secret theirs is not in this namespace: create it" in words
        assert "nothing is made" in words
        assert (_finalizers(kube), kube.list("pods")) == ([], {})
        await asyncio.to_thread(_make_secret, kube)
        await operator.settle()
        assert kube.condition("SpecValid")[:2] == ("Unknown", "PreflightRunning")

    drive(operator_kubeconfig, kube, play)


@pytest.mark.failure_mode(45)
@pytest.mark.failure_mode(64)
def test_the_charts_notes_say_what_to_do_before_and_after_an_uninstall() -> None:
    notes = NOTES.read_text()
    assert "Delete\nsuch resources before you uninstall" in notes
    assert 'kubectl patch weightsync NAME -n NAMESPACE --type=merge -p \'{"metadata":{"finalizers":null}}\'' in notes
