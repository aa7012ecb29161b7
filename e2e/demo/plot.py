"""Draws `.lab/demo/report.png`: reward over versions, the phases of each push, the set-up's times. Imports matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from e2e.demo.report import Report, RewardSummary, standard_errors

matplotlib.use("Agg")

INK, GRID, FIRST, SECOND, CACHED = "#20242a", "#d9dde3", "#2a6fbb", "#c2541b", "#a9c8e6"
PUSH_PHASES = ("convert", "plan", "open", "wire", "verify", "commit")
"""In the order in which a push goes through them."""
SHOWN_FROM_S = 1.0
"""Set-up phases that took less are counted, not drawn."""
PHASE_COLORS = ("#2a6fbb", "#6aa7d8", "#c2541b", "#e9a26b", "#4f8a4c", "#a6c8a0", "#7d6aa8")


def draw(report: Report, path: Path) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(11, 11), dpi=110, layout="constrained")
    rewards, pushes, setup = figure.subplots(3, 1, height_ratios=(4, 3, 4))
    draw_rewards(rewards, report)
    draw_pushes(pushes, report)
    draw_timings(setup, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_rewards(axes: Axes, report: Report) -> None:
    """Mean reward of what was sampled from each version, one standard deviation about it, and the two measurements."""
    versions = [each.version for each in report.reward]
    means = [each.mean for each in report.reward]
    low = [max(0.0, each.mean - each.std) for each in report.reward]
    high = [min(1.0, each.mean + each.std) for each in report.reward]
    axes.fill_between(versions, low, high, color=FIRST, alpha=0.18, linewidth=0, label="one standard deviation")
    axes.plot(versions, means, color=FIRST, marker="o", markersize=4, label="training samples, mean")
    last = max((push.version for push in report.versions), default=0)
    _mark(axes, 0, report.baseline_reward, f"before, n = {report.baseline_reward.samples}")
    _mark(axes, last, report.final_reward, f"after, n = {report.final_reward.samples}")
    above = standard_errors(report.baseline_reward, report.final_reward)
    axes.set_title(
        f"Answers change with the weights: {above:.0f} standard errors above the baseline", loc="left", color=INK
    )
    axes.set(xlabel="weight version that answered", ylabel="reward: share of capital letters", ylim=(0, 1.05))
    axes.legend(frameon=False, loc="lower right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def draw_pushes(axes: Axes, report: Report) -> None:
    """Seconds of each push by phase, stacked."""
    told = {name for push in report.versions for name in push.phases}
    names = [name for name in PUSH_PHASES if name in told] + sorted(told - set(PUSH_PHASES))
    versions = [push.version for push in report.versions]
    bottom = [0.0] * len(versions)
    for number, name in enumerate(names):
        heights = [push.phases.get(name, 0.0) for push in report.versions]
        axes.bar(
            versions, heights, bottom=bottom, color=PHASE_COLORS[number % len(PHASE_COLORS)], label=name, width=0.8
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    payload = max((push.bytes for push in report.versions), default=0)
    axes.set_title(
        f"Phases of each push, {payload / 1e6:.0f} MB to {len(report.replicas)} engines", loc="left", color=INK
    )
    axes.set(xlabel="version", ylabel="seconds")
    if names:
        axes.legend(frameon=False, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1), fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def draw_timings(axes: Axes, report: Report) -> None:
    """Seconds of each phase that took any time worth a bar, with a mark at its budget."""
    shown = {name: timing for name, timing in report.timings.items() if timing.seconds >= SHOWN_FROM_S}
    rows = range(len(shown))
    seconds = [timing.seconds for timing in shown.values()]
    axes.barh(rows, seconds, color=[CACHED if timing.cached else FIRST for timing in shown.values()], height=0.65)
    budgets = [timing.budget_s for timing in shown.values()]
    axes.scatter(budgets, rows, marker="|", s=110, color=INK, label="budget")
    axes.set_yticks(list(rows), list(shown), fontsize="small")
    axes.invert_yaxis()
    if seconds:
        axes.set_xlim(0, 1.15 * max(seconds))
    title = f"Time of each phase; {report.total_seconds:.0f} s in all"
    short = len(report.timings) - len(shown)
    axes.set_title(f"{title}; {short} more took less than {SHOWN_FROM_S:.0f} s each", loc="left", color=INK)
    axes.set_xlabel("seconds (pale: found its work done)")
    axes.legend(frameon=False, loc="lower right")
    _plain(axes)


def _mark(axes: Axes, version: int, measured: RewardSummary, label: str) -> None:
    color = SECOND if version else INK
    axes.errorbar(
        [version],
        [measured.mean],
        yerr=[measured.stderr],
        color=color,
        marker="s",
        capsize=4,
        linestyle="",
        label=label,
    )


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
