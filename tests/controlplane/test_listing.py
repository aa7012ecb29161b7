"""Lists of children are asked for again when something may have changed, and what decides about gangs when it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest

from weightsync_operator.listing import SECRET, UNWATCHED_S, WATCHED, WATCHED_S, Listings, pack

KEY, OTHER = ("ns", "a"), ("ns", "b")


class _Cluster:
    """Answers with the number of the question, and counts."""

    def __init__(self, while_asked: Callable[[], None] = lambda: None) -> None:
        self.asked = 0
        self._while_asked = while_asked

    async def list(self, kind: str, namespace: str, selector: str) -> list[dict[str, Any]]:
        self.asked += 1
        self._while_asked()
        assert (namespace, selector.rpartition("=")[2]) == KEY
        return [_child(kind, self.asked)]

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self.asked += 1
        return None if self.asked > 1 else {"kind": kind, "metadata": {"name": name}}


def _child(kind: str, number: int) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": f"{kind}-{number}", "managedFields": ["who", "cares"]}}


async def _names(listings: Listings, cluster: _Cluster, kind: str = "Service", **options: bool) -> list[str]:
    found = await listings.list(cluster, KEY, kind, **options)  # type: ignore[arg-type]
    assert [child["kind"] for child in found] == [kind] * len(found)
    return [child["metadata"]["name"] for child in found]


def _run(scenario: Callable[[Listings, _Cluster], Coroutine[Any, Any, None]]) -> _Cluster:
    cluster = _Cluster()
    asyncio.run(scenario(Listings(), cluster))
    return cluster


def test_what_did_not_change_is_not_asked_for_again() -> None:
    async def scenario(listings: Listings, cluster: _Cluster) -> None:
        assert await _names(listings, cluster) == await _names(listings, cluster) == ["Service-1"]
        listings.changed(KEY, "ConfigMap")
        listings.changed(OTHER, "Service")
        assert await _names(listings, cluster) == ["Service-1"]
        listings.changed(KEY, "Service")
        assert await _names(listings, cluster) == ["Service-2"]
        listings.forget(KEY)
        assert await _names(listings, cluster) == ["Service-3"]

    assert _run(scenario).asked == 3


@pytest.mark.failure_mode(62)
def test_fresh_means_asked() -> None:
    async def scenario(listings: Listings, cluster: _Cluster) -> None:
        assert await _names(listings, cluster, "Pod") == ["Pod-1"]
        assert await _names(listings, cluster, "Pod", fresh=True) == ["Pod-2"]
        assert await _names(listings, cluster, "Pod") == ["Pod-2"]

    _run(scenario)


def test_a_change_while_the_api_server_answers_is_not_lost() -> None:
    listings = Listings()
    told = [True]
    cluster = _Cluster(lambda: listings.changed(KEY, "Service") if told and told.pop() else None)

    async def scenario() -> None:
        await _names(listings, cluster)
        assert await _names(listings, cluster) == ["Service-2"]

    asyncio.run(scenario())


@pytest.mark.failure_mode(37)
@pytest.mark.parametrize(("kind", "lasts_s"), [("ServiceAccount", UNWATCHED_S), ("Service", WATCHED_S)])
def test_what_no_event_tells_is_found_after_a_time(monkeypatch: pytest.MonkeyPatch, kind: str, lasts_s: float) -> None:
    now = [1000.0]
    monkeypatch.setattr("weightsync_operator.listing.clock", lambda: now[0])

    async def scenario(listings: Listings, cluster: _Cluster) -> None:
        await _names(listings, cluster, kind)
        now[0] += lasts_s
        assert await _names(listings, cluster, kind) == [f"{kind}-1"]
        now[0] += 1
        assert await _names(listings, cluster, kind) == [f"{kind}-2"]

    _run(scenario)


@pytest.mark.parametrize("namespace", [None, "ns"])
def test_nothing_is_remembered_of_a_kind_whose_watch_is_down(namespace: str | None) -> None:
    async def scenario(listings: Listings, cluster: _Cluster) -> None:
        await _names(listings, cluster)
        listings.watched("Service", "elsewhere", well=False)
        assert await _names(listings, cluster) == ["Service-1"]
        listings.watched("Service", namespace, well=False)
        assert await _names(listings, cluster) == ["Service-2"]
        assert await _names(listings, cluster) == ["Service-3"]
        listings.watched("Service", namespace, well=True)
        assert await _names(listings, cluster) == ["Service-3"]

    _run(scenario)


def _packed(number: int) -> bytes:
    return pack("Service", _child("Service", number))


def _fill(listings: Listings, found: Mapping[tuple[str, str], int], namespace: str | None = None) -> set[Any]:
    """A whole list of Services, asked for now."""
    asked = listings.now()
    return set(listings.fill("Service", namespace, asked, {key: [_packed(n)] for key, n in found.items()}))


def test_a_whole_list_answers_for_each_resource_and_says_whose_is_new() -> None:
    """1 first all is new; 2 nothing is; 3 one changed and one has none left; 4 a namespace's list says nothing of others."""

    async def scenario(listings: Listings, cluster: _Cluster) -> None:
        assert _fill(listings, {KEY: 7, OTHER: 8}) == {KEY, OTHER}
        assert await _names(listings, cluster) == ["Service-7"]
        assert _fill(listings, {KEY: 7, OTHER: 8}) == set()
        assert _fill(listings, {OTHER: 9}) == {KEY, OTHER}
        assert await _names(listings, cluster) == []
        assert _fill(listings, {}, "elsewhere") == set()

    assert _run(scenario).asked == 0


def test_a_whole_list_from_before_a_change_answers_nobody() -> None:
    async def scenario(listings: Listings, cluster: _Cluster) -> None:
        asked = listings.now()
        listings.changed(KEY, "Service")
        listings.fill("Service", None, asked, {KEY: [_packed(7)]})
        assert await _names(listings, cluster) == ["Service-1"]

    _run(scenario)


def test_the_secret_is_read_by_its_name() -> None:
    async def scenario(listings: Listings, cluster: _Cluster) -> None:
        assert await _names(listings, cluster, SECRET) == await _names(listings, cluster, SECRET) == ["a-auth"]
        listings.changed(KEY, SECRET)
        assert await _names(listings, cluster, SECRET) == []

    assert _run(scenario).asked == 2


def test_a_secret_is_not_watched() -> None:
    assert SECRET not in WATCHED
