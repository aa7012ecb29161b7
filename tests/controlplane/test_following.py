"""Children are followed by one list and one watch a kind: what changed is looked at, and no outage is too long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from weightsync_operator.api.names import LABEL_COMPONENT, LABEL_INSTANCE, Component
from weightsync_operator.children import Children, _Follow
from weightsync_operator.cluster import ApiError, ApiUnavailable
from weightsync_operator.listing import LISTED, WATCHED, Listings

A, B = ("ns", "a"), ("ns", "b")
FORBIDDEN = ApiError(403, "services is forbidden", {})
EXPIRED = ApiError(410, "too old resource version", {})


def _child(instance: str, name: str = "x", component: Component = Component.MODEL_EXPRESS) -> dict[str, Any]:
    labels = {LABEL_INSTANCE: instance, LABEL_COMPONENT: component}
    return {"metadata": {"name": name, "namespace": "ns", "labels": labels, "resourceVersion": "5"}}


class _Cluster:
    """Services are listed and watched as a script says; of other kinds there are none, and nothing happens to them."""

    def __init__(self, lists: list[Any], watches: list[Any]) -> None:
        self.lists, self.watches = lists, watches
        self.asked: list[tuple[str, str]] = []
        self.others: set[str] = set()

    async def list_page(self, kind: str, namespace: str | None, selector: str, after: str) -> dict[str, Any]:
        if kind != "Service":
            self.others.add(kind)
            return {"items": None, "metadata": {"resourceVersion": "1"}}
        self.asked.append(("list", after))
        return self._next(self.lists)

    @contextlib.asynccontextmanager
    async def watch(
        self, kind: str, namespace: str | None, selector: str, since: str
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        if kind != "Service":
            await asyncio.Event().wait()
        self.asked.append(("watch", since))
        yield self._events(self._next(self.watches))

    @staticmethod
    def _next(script: list[Any]) -> Any:
        answer = script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _events(self, events: list[Any]) -> AsyncIterator[Any]:
        for event in events:
            if event == "silence":
                await asyncio.Event().wait()
            if isinstance(event, Exception):
                raise event
            yield event


def _page(*children: dict[str, Any], version: str = "5", after: str = "") -> dict[str, Any]:
    return {"items": list(children), "metadata": {"resourceVersion": version, "continue": after}}


def _event(type_: str, child: dict[str, Any], version: str) -> dict[str, Any]:
    return {"type": type_, "object": {**child, "metadata": {**child["metadata"], "resourceVersion": version}}}


BOOKMARK = _event("BOOKMARK", _child(""), "81")


class _Told:
    def __init__(self) -> None:
        self.poked: list[tuple[str, str]] = []
        self.disrupted: list[tuple[tuple[str, str], str]] = []


def _follow(cluster: _Cluster, done: Callable[[_Told], bool]) -> tuple[_Told, Listings]:
    """Follow until `done`; what was told, and what is known of children then."""
    told, listings = _Told(), Listings()

    async def scenario() -> None:
        children = Children(
            cluster,  # type: ignore[arg-type]
            (),
            listings,
            poke=told.poked.append,
            disrupted=lambda key, uid: told.disrupted.append((key, uid)),
        )
        async with children, asyncio.timeout(20):
            await children.listed()
            while not done(told):  # noqa: ASYNC110 - the script's end is no event
                await asyncio.sleep(0.005)

    asyncio.run(scenario())
    return told, listings


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for pause in ("FIRST_RETRY_S", "MAX_RETRY_S", "PAUSE_S"):
        monkeypatch.setattr(f"weightsync_operator.children.{pause}", 0.001)


def test_a_restart_takes_all_children_from_one_list_a_kind_and_an_event_pokes() -> None:
    """1 two pages are one list; 2 what they hold is known, and pokes nobody, since Kopf does; 3 an event pokes."""
    changed = _event("MODIFIED", _child("b"), "6")
    cluster = _Cluster([_page(_child("a"), after="more"), _page(_child("b"))], [[changed, "silence"]])
    told, listings = _follow(cluster, lambda told: bool(told.poked))
    assert cluster.asked == [("list", ""), ("list", "more"), ("watch", "5")]
    assert told.poked == [B]
    assert (listings.remembers(A, "Service"), listings.remembers(B, "Service")) == (True, False)
    assert {*cluster.others, "Service"} == set(LISTED)


@pytest.mark.failure_mode(37)
def test_a_watch_that_ends_goes_on_where_it_was() -> None:
    events = [
        [_event("ADDED", _child("a"), "6"), _event("BOOKMARK", _child(""), "9")],
        [_event("DELETED", _child("b"), "10")],
    ]
    cluster = _Cluster([_page()], [*events, ["silence"]])
    told, _ = _follow(cluster, lambda told: len(cluster.asked) == 4)
    assert cluster.asked == [("list", ""), ("watch", "5"), ("watch", "9"), ("watch", "10")]
    assert told.poked == [A, B]


@pytest.mark.failure_mode(37)
@pytest.mark.parametrize("how", ["on entry", "as an event"])
def test_a_deletion_that_fell_into_a_gap_is_found_by_a_new_list(how: str) -> None:
    """Nobody tells that b's Service went."""
    lists = [_page(_child("a"), _child("b")), _page(_child("a"), version="80")]
    cluster = _Cluster(lists, [EXPIRED if how == "on entry" else [EXPIRED], [BOOKMARK, "silence"]])
    told, listings = _follow(cluster, lambda told: bool(told.poked))
    assert cluster.asked == [("list", ""), ("watch", "5"), ("list", ""), ("watch", "80")]
    assert told.poked == [B]
    assert listings.remembers(B, "Service")


@pytest.mark.parametrize("trouble", [FORBIDDEN, ApiUnavailable("away")], ids=["RBAC", "no answer"])
def test_an_outage_of_any_length_is_told_once_survived_and_nothing_is_remembered_during_it(
    trouble: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """1 the watch breaks, and 50 more are refused; 2 meanwhile passes ask; 3 it goes on with what happened since."""
    listings_during: list[bool] = []
    outage = 50 * [trouble]
    cluster = _Cluster(
        52 * [_page(_child("a"), _child("b"))], [[trouble], *outage, [_event("DELETED", _child("b"), "6"), "silence"]]
    )
    told, listings = _Told(), Listings()

    async def scenario() -> None:
        children = Children(
            cluster,  # type: ignore[arg-type]
            (),
            listings,
            poke=told.poked.append,
            disrupted=lambda key, uid: None,
        )
        async with children, asyncio.timeout(20):
            await children.listed()
            while not told.poked:
                if 1 < len(cluster.watches) < 50:
                    listings_during.append(listings.remembers(A, "Service"))
                await asyncio.sleep(0)

    asyncio.run(scenario())
    assert set(listings_during) == {False}
    assert told.poked == [B]
    assert listings.remembers(A, "Service")
    assert [record.message for record in caplog.records] == [
        f"children: Service: {trouble}; tried again until it works",
        "children: Service: followed again",
    ]


def test_an_error_right_after_the_answer_is_no_success(caplog: pytest.LogCaptureFixture) -> None:
    """Five watches are answered with 200 and then an ERROR event: one trouble, told once, and each time all is listed anew."""
    cluster = _Cluster(6 * [_page()], [*5 * [[FORBIDDEN]], [_event("ADDED", _child("a"), "6"), "silence"]])
    _follow(cluster, lambda told: bool(told.poked))
    assert cluster.asked == 6 * [("list", ""), ("watch", "5")]
    assert [record.message for record in caplog.records] == [
        f"children: Service: {FORBIDDEN}; tried again until it works",
        "children: Service: followed again",
    ]


def test_a_kind_that_may_not_be_listed_holds_up_no_start() -> None:
    cluster = _Cluster([*20 * [FORBIDDEN], _page(_child("a"))], [["silence"]])
    told, _ = _follow(cluster, lambda told: bool(told.poked))
    assert told.poked == [A], "Kopf poked it before its children could be listed"


def test_a_kind_that_is_only_listed_is_remembered_again_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing watches it: only its list can say that the trouble is over."""
    (kind, _) = sorted(set(LISTED) - WATCHED)
    cluster = _Cluster([FORBIDDEN, _page(_child("a"))], [])
    told, listings = _Told(), Listings()
    follow = _Follow(cluster, kind, None, listings, told.poked.append, lambda key, uid: None)  # type: ignore[arg-type]
    cluster.list_page = lambda kind, *rest: _Cluster.list_page(cluster, "Service", *rest)  # type: ignore[method-assign]
    asyncio.run(asyncio.wait_for(follow.run(), 20))
    assert listings.remembers(A, kind)
    assert caplog.records[-1].message == f"children: {kind}: followed again"


def test_a_bug_is_visible_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    broken = {"type": "ADDED", "object": {}}
    cluster = _Cluster([_page(), _page(_child("a"))], [[broken], ["silence"]])
    told, _ = _follow(cluster, lambda told: bool(told.poked))
    assert told.poked == [A]
    assert "this is a bug of the operator" in caplog.text


def test_a_pod_that_is_taken_away_tells_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a list finds: the operator may start after it."""
    pod = _child("a", component=Component.TRAINER)
    pod["status"] = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}
    pod["metadata"]["ownerReferences"] = [{"kind": "Job", "uid": "job-1"}]
    monkeypatch.setattr("weightsync_operator.children.LISTED", ("Pod",))
    cluster = _Cluster([_page(pod)], [[_event("MODIFIED", pod, "6"), "silence"]])
    monkeypatch.setattr(cluster, "list_page", lambda kind, *rest: _Cluster.list_page(cluster, "Service", *rest))
    monkeypatch.setattr(cluster, "watch", lambda kind, *rest: _Cluster.watch(cluster, "Service", *rest))
    told, _ = _follow(cluster, lambda told: len(told.disrupted) == 2)
    assert told.disrupted == 2 * [(A, "job-1")]


def test_what_is_watched_is_listed() -> None:
    assert set(LISTED) > WATCHED
