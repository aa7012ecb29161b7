"""Which replica repairs whom: pure, so hypothesis draws the fleets."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dataplane.ledger_makers import member
from weightsync.rendezvous.records import Claim, Head, Member
from weightsync.sources import LOANS_AT_ONCE, choose_source, loans, needs_repair

HEAD = Head(epoch=3, version=7, version_epoch=2, published=9)
"""Version 7 was committed in epoch 2; a trainer of epoch 3 has committed nothing yet."""
TARGET = member("late", version=0, epoch=0)


def healthy(name: str, **changes: object) -> Member:
    return member(name, **({"version": 7, "epoch": 2, "lends": True} | changes))


@st.composite
def fleets(draw: st.DrawFn) -> dict[str, Member]:
    names = draw(st.lists(st.integers(0, 30).map("engine-{}".format), unique=True, max_size=8))
    return {
        name: healthy(
            name,
            version=draw(st.sampled_from([7, 7, 7, 6])),
            epoch=draw(st.sampled_from([2, 2, 2, 1])),
            state=draw(st.sampled_from(["CLEAN", "CLEAN", "CLEAN", "OPEN", "VERIFIED", "DIRTY"])),
            lends=draw(st.sampled_from([True, True, True, False])),
            layout_digests=(draw(st.sampled_from(["layout", "layout", "layout", "other"])),),
        )
        for name in names
    }


counts = st.dictionaries(st.integers(0, 30).map("engine-{}".format), st.integers(0, LOANS_AT_ONCE + 1))


@given(fleets(), counts, counts, st.randoms())
def test_only_a_healthy_replica_of_the_same_layout_lends_and_listing_order_is_nothing(
    fleet: dict[str, Member], lent: dict[str, int], failed: dict[str, int], random: object
) -> None:
    """Whoever is chosen could; when nobody is, nobody could; shuffling changes nothing."""
    failures = {f"{name}-first": count for name, count in failed.items()}
    able = {
        name
        for name, m in fleet.items()
        if (m.state, m.order, m.lends, m.layout_digests) == ("CLEAN", (2, 7), True, ("layout",))
        and lent.get(name, 0) < LOANS_AT_ONCE
    }
    chosen = choose_source(TARGET, fleet, HEAD, lent, failures)
    assert (chosen is not None) == bool(able)
    items = list(fleet.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    assert choose_source(TARGET, dict(items), HEAD, lent, failures) == chosen
    if chosen is not None:
        assert chosen.replica in able
        rank = (failed.get(chosen.replica, 0), lent.get(chosen.replica, 0))
        assert rank == min((failed.get(name, 0), lent.get(name, 0)) for name in able)


@given(st.integers(1, 6), st.integers(1, 40))
def test_loans_spread_over_the_sources(sources: int, late: int) -> None:
    """Replicas that claim one after another: none lends more than one loan above another, nor more than LOANS_AT_ONCE."""
    fleet = {f"engine-{i}": healthy(f"engine-{i}") for i in range(sources)}
    lent: Counter[str] = Counter()
    for i in range(late):
        chosen = choose_source(member(f"late-{i}"), fleet, HEAD, lent, {})
        if chosen is None:
            break
        lent[chosen.replica] += 1
    assert sum(lent.values()) == min(late, sources * LOANS_AT_ONCE)
    assert max(lent[name] for name in fleet) - min(lent[name] for name in fleet) <= 1


def test_a_replica_does_not_repair_itself() -> None:
    torn = healthy("engine-0", state="CLEAN")
    assert choose_source(torn, {"engine-0": torn}, HEAD, {}, {}) is None


@pytest.mark.parametrize(
    ("state", "order", "needs"),
    [
        ("CLEAN", (2, 7), False),
        ("CLEAN", (2, 6), True),
        ("CLEAN", (1, 9), True),
        ("DIRTY", (2, 7), True),
        ("OPEN", (2, 6), False),
        ("VERIFIED", (2, 6), False),
    ],
)
def test_who_is_torn_or_behind_needs_a_repair(state: str, order: tuple[int, int], needs: bool) -> None:
    assert needs_repair(member(state=state, epoch=order[0], version=order[1]), HEAD) is needs


def test_loans_of_the_dead_do_not_count() -> None:
    live = {name: member(name) for name in ("engine-1", "engine-2", "engine-3")}
    claims = [
        Claim(replica="engine-1", source="engine-0", lease="l", word="engine-1-first"),
        Claim(replica="engine-2", source="engine-0", lease="l", word="its-predecessor"),
        Claim(replica="engine-3", source="", lease="l", word="engine-3-first"),
        Claim(replica="gone", source="engine-0", lease="l", word="gone-first"),
    ]
    assert loans(claims, live) == {"engine-0": 1}
