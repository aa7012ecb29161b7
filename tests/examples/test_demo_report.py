"""The demo's figures and the claims that decide its exit status."""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from e2e.demo.ledger import split
from e2e.demo.plot import draw
from e2e.demo.questions import GREEDY_PROMPTS, mismatches
from e2e.demo.report import (
    FreshEngine,
    Mismatch,
    PhaseTiming,
    Replica,
    Report,
    RewardSummary,
    VersionPush,
    VersionReward,
    failed_claims,
    standard_errors,
    summarize,
)

VERSIONS = 17


def push(version: int, **changes: object) -> VersionPush:
    values = {
        "version": version,
        "epoch": 1,
        "step": version - 1,
        "seconds": 0.9,
        "bytes": 538_000_000,
        "gbps": 1.2,
        "pause_seconds": 0.7,
        "digest": "ab" * 8,
        "digest_ok": True,
        "phases": {"convert": 0.1, "open": 0.2, "wire": 0.5, "verify": 0.05, "commit": 0.05},
        "transports": ["tcp"],
    }
    return VersionPush.model_validate(values | changes)


def sample_report(**changes: object) -> Report:
    """A run in which everything holds."""
    fresh = FreshEngine(
        checkpoint="/data/c", step=VERSIONS - 1, prompts=20, tokens=640, engines=["e-0", "e-1"], mismatches=[]
    )
    report = Report(
        versions=[push(version) for version in range(1, VERSIONS + 1)],
        reward=[VersionReward(version=v, step=v, mean=0.05 * v, std=0.1, samples=16) for v in range(1, VERSIONS)],
        baseline_reward=RewardSummary(mean=0.05, stderr=0.01, samples=96),
        final_reward=RewardSummary(mean=0.85, stderr=0.02, samples=96),
        replicas=[Replica(name=name, version=VERSIONS, state="CLEAN") for name in ("e-0", "e-1")],
        fresh_engine_equal=True,
        fresh_engine=fresh,
        timings={
            "lab: cluster": PhaseTiming(seconds=30, budget_s=60, cached=False),
            "engines": PhaseTiming(seconds=9, budget_s=60, cached=True),
        },
        total_seconds=300,
    )
    return report.model_copy(update=changes)


def test_a_run_in_which_all_holds_fails_no_claim():
    assert failed_claims(sample_report()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": [push(v) for v in range(1, 16)] + []}, "15 versions were committed"),
        ({"final_reward": RewardSummary(mean=0.15, stderr=0.02, samples=96)}, "4.5 standard errors above"),
        ({"final_reward": RewardSummary(mean=0.01, stderr=0.001, samples=96)}, "-4.0 standard errors above"),
        ({"baseline_reward": RewardSummary(mean=0.05, stderr=0.01, samples=63)}, "a mean is of 63 samples"),
        ({"versions": [push(v, digest_ok=v != 9) for v in range(1, VERSIONS + 1)]}, r"without a verified digest: [9]"),
        ({"replicas": [Replica(name="e-0", version=16, state="CLEAN")]}, "do not hold version 17 clean: ['e-0']"),
        ({"replicas": [Replica(name="e-1", version=17, state="DIRTY")]}, "do not hold version 17 clean: ['e-1']"),
        ({"replicas": []}, "none was told of"),
        ({"fresh_engine_equal": False}, "answer otherwise than a fresh one"),
    ],
)
def test_each_claim_that_does_not_hold_is_named(changes: dict[str, object], words: str):
    failed = failed_claims(sample_report(**changes))
    assert any(words in line for line in failed), failed


def test_report_json_has_the_fields_that_the_issue_names():
    told = json.loads(sample_report().model_dump_json())
    assert {"version", "seconds", "bytes", "gbps", "pause_seconds", "digest_ok"} <= told["versions"][0].keys()
    assert told["baseline_reward"].keys() == told["final_reward"].keys() == {"mean", "stderr", "samples"}
    assert told["replicas"][0].keys() == {"name", "version", "state"}
    assert told["fresh_engine_equal"] is True and told["reward"] and told["timings"]
    assert Report.model_validate_json(json.dumps(told)) == sample_report()


def test_an_unknown_field_is_refused():
    with pytest.raises(ValidationError, match="speed"):
        push(1, speed=3)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_standard_error_shrinks_with_the_root_of_the_samples(rewards: list[float]):
    once, four_times = summarize(rewards), summarize(rewards * 4)
    assert once.mean == pytest.approx(four_times.mean)
    assert once.stderr * math.sqrt(len(rewards)) == pytest.approx(statistics.stdev(rewards))
    assert four_times.stderr <= once.stderr / 2 + 1e-12


def test_one_sample_has_no_standard_error():
    with pytest.raises(ValueError, match="1 sample"):
        summarize([0.3])


def test_the_gain_is_measured_in_standard_errors_of_the_difference():
    before, after = RewardSummary(mean=0.1, stderr=0.03, samples=64), RewardSummary(mean=0.6, stderr=0.04, samples=64)
    assert standard_errors(before, after) == pytest.approx(10.0)
    exact = RewardSummary(mean=1.0, stderr=0.0, samples=64)
    assert standard_errors(exact, exact) == 0.0
    assert standard_errors(RewardSummary(mean=0.0, stderr=0.0, samples=64), exact) == math.inf


def test_a_mismatch_names_the_first_token_that_differs():
    fresh = [(1, 2, 3)] * len(GREEDY_PROMPTS)
    live = {"same": list(fresh), "other": [(1, 2, 3), (1, 9, 3), (1, 2), *fresh[3:]]}
    assert mismatches(live, fresh) == [
        Mismatch(engine="other", prompt=GREEDY_PROMPTS[1], first_token=1),
        Mismatch(engine="other", prompt=GREEDY_PROMPTS[2], first_token=2),
    ]


def test_twenty_different_prompts_are_compared():
    assert len(set(GREEDY_PROMPTS)) == 20


def test_catch_ups_are_no_versions_and_aborted_pushes_are_told():
    record = push(1).model_dump() | {"outcome": "COMMIT", "catch_up": False, "reason": "", "push_id": "x"}
    pushes = [record | {"version": 4}, record | {"version": 3, "outcome": "ABORT", "reason": "e-1 is lost"}]
    pushes += [record | {"version": 2, "catch_up": True}, record | {"version": 2}]
    committed, aborted = split(pushes)
    assert [each.version for each in committed] == [2, 4]
    assert aborted == ["version 3: e-1 is lost"]


def test_the_picture_renders(tmp_path):
    draw(sample_report(), tmp_path / "demo" / "report.png")
    assert (tmp_path / "demo" / "report.png").read_bytes().startswith(b"\x89PNG")
    draw(sample_report(versions=[], reward=[], timings={}), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000
