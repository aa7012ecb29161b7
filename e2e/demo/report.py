"""What `.lab/demo/report.json` holds, and the claims that it must bear out. Pure; imports pydantic.

Every figure is measured in the run that the report is of.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

MIN_VERSIONS = 16
MIN_SAMPLES = 64
MIN_STANDARD_ERRORS = 5.0


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RewardSummary(_Record):
    """A mean over independent samples."""

    mean: float
    stderr: float
    """Standard error of the mean."""
    samples: int


class VersionReward(_Record):
    """Rewards of the answers that the trainer sampled from one version."""

    version: int
    step: int
    """The trainer's step that learned from them."""
    mean: float
    std: float
    """Standard deviation of single rewards."""
    samples: int


class VersionPush(_Record):
    """One committed push, as the ledger has it."""

    version: int
    epoch: int
    step: int
    seconds: float
    bytes: int
    """Payload counted at the receivers, all replicas together."""
    gbps: float
    pause_seconds: float
    digest: str
    digest_ok: bool
    """Every replica measured the digest in its live memory before it served."""
    phases: dict[str, float]
    transports: list[str]


class Replica(_Record):
    """One engine as the resource's status tells it at the end."""

    name: str
    version: int | None
    state: str


class Mismatch(_Record):
    """A prompt that a live engine answers otherwise than the fresh one."""

    engine: str
    prompt: str
    first_token: int
    """Index of the first token that differs."""


class FreshEngine(_Record):
    """The comparison with a freshly started engine on the checkpoint that the trainer saved."""

    checkpoint: str
    step: int
    prompts: int
    tokens: int
    """Tokens compared, over all live engines."""
    engines: list[str]
    mismatches: list[Mismatch]


class PhaseTiming(_Record):
    """A set-up phase."""

    seconds: float
    budget_s: float
    cached: bool
    """Whether it found its work done."""


class Report(_Record):
    """The whole of report.json."""

    versions: list[VersionPush]
    aborted: list[str] = Field(default_factory=list)
    """Pushes that did not commit, with the reason."""
    reward: list[VersionReward]
    baseline_reward: RewardSummary
    """Of version 0, before training."""
    final_reward: RewardSummary
    """Of the last version, after training."""
    replicas: list[Replica]
    fresh_engine_equal: bool
    fresh_engine: FreshEngine
    timings: dict[str, PhaseTiming]
    total_seconds: float


def summarize(rewards: Sequence[float]) -> RewardSummary:
    """Mean and its standard error. Raises ValueError for fewer than two samples, of which nothing can be said."""
    if len(rewards) < 2:
        raise ValueError(f"{len(rewards)} sample(s): at least 2 are needed for a standard error")
    stderr = statistics.stdev(rewards) / math.sqrt(len(rewards))
    return RewardSummary(mean=statistics.fmean(rewards), stderr=stderr, samples=len(rewards))


def standard_errors(baseline: RewardSummary, final: RewardSummary) -> float:
    """How far the final mean lies above the baseline, in standard errors of the difference."""
    spread = math.hypot(baseline.stderr, final.stderr)
    gain = final.mean - baseline.mean
    return gain / spread if spread > 0 else math.copysign(math.inf, gain) if gain else 0.0


def failed_claims(report: Report) -> list[str]:
    """What the demo claims and this run does not show, one line each; empty when all holds."""
    last = max((push.version for push in report.versions), default=0)
    wrong_digests = [push.version for push in report.versions if not push.digest_ok]
    behind = [replica.name for replica in report.replicas if (replica.version, replica.state) != (last, "CLEAN")]
    above = standard_errors(report.baseline_reward, report.final_reward)
    fewest = min(report.baseline_reward.samples, report.final_reward.samples)
    checks = {
        f"{len(report.versions)} versions were committed, {MIN_VERSIONS} are claimed": len(report.versions)
        >= MIN_VERSIONS,
        f"the final reward is {above:.1f} standard errors above the baseline, more than {MIN_STANDARD_ERRORS:.0f} are claimed": (
            above > MIN_STANDARD_ERRORS
        ),
        f"a mean is of {fewest} samples, at least {MIN_SAMPLES} are claimed": fewest >= MIN_SAMPLES,
        f"versions without a verified digest: {wrong_digests}": not wrong_digests,
        f"engines that do not hold version {last} clean: {behind or 'none was told of'}": bool(report.replicas)
        and not behind,
        f"live engines answer otherwise than a fresh one: {_first(report.fresh_engine.mismatches)}": report.fresh_engine_equal,
    }
    return [words for words, held in checks.items() if not held]


def _first(found: Sequence[Mismatch]) -> str:
    shown = [f"{each.engine} to {each.prompt!r} from token {each.first_token}" for each in found[:3]]
    return f"{len(found)} answers, " + "; ".join(shown)
