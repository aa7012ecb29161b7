"""Staged commits on real processes without a forward pass: one engine of two tensor parallel ranks, one of one, asked all the time.

Every token of an answer says what all ranks' memory held at that moment, so that a version that is half applied would be seen.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.fixtures.fleet import until
from tests.fixtures.killable import REPLICAS, Fleet

pytestmark = pytest.mark.timeout(300)


@pytest.mark.failure_mode(13)
def test_engines_answer_through_five_pushes_and_never_from_two_versions(tmp_path: Path) -> None:
    """1. five pushes are committed by all replicas; 2. every answer is whole, of one version, and none was refused; 3. versions
    only go up; 4. the pause is a part of a push.
    """
    with Fleet(tmp_path, timeout_seconds=20.0, commit="staged", staging="device", quorum=1) as fleet:
        for name in REPLICAS:
            until(f"{name} serves", lambda n=name: fleet.state(n).get("serving"), 60)
        until("somebody asks", fleet.answers.exists, 30)
        offset = fleet.answers.stat().st_size
        for step in range(1, 6):
            assert ["report" in said for said in fleet.push(step)] == [True, True]
        for name in REPLICAS:
            until(f"{name} is at version 5", lambda n=name: fleet.state(n).get("version") == 5, 30)
        pushes = fleet.pushes()
        log = fleet.log_since(offset)
    assert [push.outcome for push in pushes[:5]] == ["COMMIT"] * 5
    assert [sorted(push.replicas) for push in pushes[:5]] == [sorted(REPLICAS)] * 5
    assert all(0 < push.copy_seconds < push.pause_seconds < push.seconds for push in pushes[:5])
    answers = [entry for entry in log if "status" in entry]
    assert {entry["status"] for entry in answers} == {200}
    assert all(len({*map(tuple, entry["tokens"])}) == 1 and len(entry["tokens"][0]) == 1 for entry in answers)
    for name in REPLICAS:
        seen = [entry["version"] for entry in log if "state" in entry and entry["replica"] == name]
        assert all(earlier <= later for earlier, later in itertools.pairwise(seen))


@pytest.mark.failure_mode(47)
@pytest.mark.failure_mode(58)
def test_a_gang_that_is_killed_in_the_middle_leaves_staged_engines_serving(tmp_path: Path) -> None:
    """1. both trainer ranks are killed while a push is open; 2. every replica is CLEAN and serving within the deadline, at the
    old or the new version; 3. the next gang's push is committed; no answer was refused or mixed.
    """
    with Fleet(tmp_path, timeout_seconds=8.0, commit="staged", staging="device") as fleet:
        for name in REPLICAS:
            until(f"{name} serves", lambda n=name: fleet.state(n).get("serving"), 60)
        until("somebody asks", fleet.answers.exists, 30)
        offset = fleet.answers.stat().st_size
        fleet.push(1)
        for rank in fleet.ranks:
            rank.freeze() if rank is fleet.ranks[1] else rank.pipe.send(2)
        fleet.ranks[1].pipe.send(2)
        for rank in fleet.ranks:
            rank.kill()
        fleet.start_gang()
        assert ["report" in said for said in fleet.push(3)] == [True, True]
        for name in REPLICAS:
            until(f"{name} serves", lambda n=name: fleet.state(n).get("serving"), 30)
        answers = [entry for entry in fleet.log_since(offset) if "status" in entry]
    assert {entry["status"] for entry in answers} == {200}
    assert all(len({*map(tuple, entry["tokens"])}) == 1 and len(entry["tokens"][0]) == 1 for entry in answers)
