"""`python -m e2e.demo`: run the demo, write its report and picture, and exit 0 only if every claim holds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from e2e.demo.cluster import NAMESPACE, Demo
from e2e.demo.plot import draw
from e2e.demo.report import Report, failed_claims, standard_errors
from e2e.demo.story import tell
from e2e.demo.timeline import Timeline
from e2e.lab.errors import LabError
from e2e.lab.paths import lab_paths


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.demo", description=__doc__)
    parser.parse_args()
    console, paths = Console(), lab_paths()
    timeline = Timeline(console)
    folder = paths.lab / "demo"
    try:
        report = tell(timeline, paths)
    except LabError as error:
        console.print(f"demo failed: {error}", style="red", markup=False, soft_wrap=True)
        console.print(f"The cluster is still up: kubectl --kubeconfig {paths.kubeconfig} get ws,pods", soft_wrap=True)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    draw(report, folder / "report.png")
    return conclude(console, timeline, Demo(timeline, paths), report, folder)


def conclude(console: Console, timeline: Timeline, demo: Demo, report: Report, folder: Path) -> int:
    """Show the resource and the result, and say what is left behind; the exit status."""
    console.print(f"\n$ kubectl get ws -n {NAMESPACE}", highlight=False)
    console.print(demo.kubectl.run("get", "ws"), markup=False, highlight=False, soft_wrap=True)
    before, after = report.baseline_reward, report.final_reward
    above = standard_errors(before, after)
    console.print(
        f"reward {before.mean:.3f} ± {before.stderr:.3f} -> {after.mean:.3f} ± {after.stderr:.3f} ({above:.1f} standard errors), "
        f"{len(report.versions)} versions, {timeline.elapsed_s:.0f} s in all",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"report {folder / 'report.json'}, picture {folder / 'report.png'}", highlight=False, soft_wrap=True)
    console.print("The cluster stays up; `make lab-down` removes it.", highlight=False)
    failed = failed_claims(report)
    for claim in failed:
        console.print(f"not shown: {claim}", style="red", markup=False, soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
