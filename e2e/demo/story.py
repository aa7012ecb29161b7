"""The demo from beginning to end, one phase a function. Reads as what a user would do by hand.

Imports the demo's own modules and the lab's.
"""

from __future__ import annotations

import json
import time
from typing import Any

from e2e.demo.cluster import LOOK_S, Demo, all_ready
from e2e.demo.fresh import begin_fresh, compare
from e2e.demo.ledger import read_pushes
from e2e.demo.model import ensure_model
from e2e.demo.questions import sample_rewards
from e2e.demo.report import FreshEngine, PhaseTiming, Replica, Report, RewardSummary
from e2e.demo.seen import condition, describe, holds
from e2e.demo.setup import create, install_chart, start_lab
from e2e.demo.timeline import Step, Timeline
from e2e.demo.training import Run, headings, row
from e2e.lab.docker import require_docker
from e2e.lab.errors import LabError
from e2e.lab.paths import LabPaths

ENGINES_TIMEOUT_S = 600.0
STEP_TIMEOUT_S = 300.0
"""A run in which no version was pushed for so long is given up."""
QUIET_S = 30.0
"""Without a new version for so long, the wait says what is seen."""
SETTLE_TIMEOUT_S = 120.0


def tell(timeline: Timeline, paths: LabPaths) -> Report:
    """Run the demo and return what was measured. Raises LabError where it cannot go on; the cluster stays up."""
    with timeline.phase("lab", budget_s=1200):
        start_lab()
    demo = Demo(timeline, paths)
    with timeline.phase("model", budget_s=120) as step:
        step.cached = ensure_model(step, docker=require_docker(paths), paths=paths)
    with timeline.phase("chart", budget_s=60) as step:
        install_chart(step, paths)
    with timeline.phase("resource", budget_s=30) as step:
        create(demo, step)
    with timeline.phase("engines", budget_s=120) as step:
        demo.wait(step, all_ready, "engines are ready", ENGINES_TIMEOUT_S)
    with timeline.phase("baseline", budget_s=30) as step:
        baseline = measure(demo, step)
        demo.client.release(demo.name)
    with timeline.phase("training", budget_s=200) as step:
        run = train(demo, step)
    with timeline.phase("final", budget_s=45) as step:
        checkpoint = begin_fresh(demo, step, run)  # it comes up while the live engines are asked
        demo.wait(step, all_ready, "engines hold the last version", SETTLE_TIMEOUT_S)
        final = measure(demo, step)
    with timeline.phase("fresh engine", budget_s=90) as step:
        fresh = compare(demo, step, checkpoint)
        demo.client.end()
    return collect(demo, run, baseline, final, fresh)


def measure(demo: Demo, step: Step) -> RewardSummary:
    """Mean reward of the service's answers now."""
    summary, example = sample_rewards(demo.client, demo.service_url)
    step.line(
        f"mean reward {summary.mean:.3f} ± {summary.stderr:.3f} of {summary.samples} answers, such as {example!r}"
    )
    return summary


def train(demo: Demo, step: Step) -> Run:
    """Show each version as it is pushed, until the trainer has ended."""
    run = Run(demo.kubectl, demo.name)
    step.line(headings())
    last_news = time.monotonic()
    while True:
        resource = demo.resource()
        for line in run.look():
            step.line(row(line))
            last_news = time.monotonic()
        if holds(resource, "Failed"):
            raise LabError(
                f"training failed: {condition(resource, 'Failed')['message']}",
                cure="kubectl logs of the trainer's pods",
            )
        if holds(resource, "Complete"):
            return run
        if time.monotonic() - last_news > STEP_TIMEOUT_S:
            seen = describe(resource, demo.pods())
            raise LabError(
                f"no version was pushed for {STEP_TIMEOUT_S:.0f} s; {seen}", cure="kubectl logs of the trainer's pods"
            )
        if time.monotonic() - last_news > QUIET_S:
            step.say(describe(resource, demo.pods()))
        time.sleep(LOOK_S)


def collect(demo: Demo, run: Run, baseline: RewardSummary, final: RewardSummary, fresh: FreshEngine) -> Report:
    """Everything that was measured, from the ledger, the trainer, the resource's status and the clock."""
    committed, aborted = read_pushes(demo)
    replicas = demo.resource()["status"]["replicas"]
    return Report(
        versions=committed,
        aborted=aborted,
        reward=run.rewards(),
        baseline_reward=baseline,
        final_reward=final,
        replicas=[Replica(name=each["name"], version=each.get("version"), state=each["state"]) for each in replicas],
        fresh_engine_equal=not fresh.mismatches,
        fresh_engine=fresh,
        timings=timings(demo),
        total_seconds=round(demo.timeline.elapsed_s, 1),
    )


def timings(demo: Demo) -> dict[str, PhaseTiming]:
    """The lab's phases as its file has them, and the demo's own."""
    lab: dict[str, dict[str, Any]] = json.loads(demo.paths.timings.read_text()) if demo.paths.timings.exists() else {}
    told = {f"lab: {name}": PhaseTiming(**values) for name, values in lab.items()}
    for name, timing in demo.timeline.timings.items():
        told[name] = PhaseTiming(seconds=round(timing.seconds, 2), budget_s=timing.budget_s, cached=timing.cached)
    return told
