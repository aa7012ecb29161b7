"""Follows a training run through the logs of the trainer's first rank, over restarts of the gang. Pure but for the client.

The trainer prints a JSON line after its first push and after each step; whatever else a log holds is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from e2e.demo.kubectl import Kubectl, Manifest
from e2e.demo.report import VersionReward

Line = dict[str, Any]
EPOCH_LABEL = "weightsync.dev/epoch"
TRAINER = "app.kubernetes.io/component=trainer"


class Run:
    """The steps seen so far."""

    def __init__(self, kubectl: Kubectl, name: str) -> None:
        self._kubectl = kubectl
        self._selector = f"app.kubernetes.io/instance={name},{TRAINER}"
        self.lines: list[Line] = []
        self._known: set[tuple[int, int]] = set()

    def look(self) -> list[Line]:
        """Lines that are new since the last look, in the order of their versions."""
        fresh = []
        for pod in self._kubectl.list("pods", self._selector):
            if is_first_rank(pod) and has_log(pod):
                log = self._kubectl.run("logs", pod["metadata"]["name"], "-c", "trainer")
                fresh += [line for line in parse(log) if self._is_new(line)]
        fresh.sort(key=lambda line: line["push"]["version"])
        self.lines += fresh
        return fresh

    @property
    def last(self) -> Line | None:
        return self.lines[-1] if self.lines else None

    def rewards(self) -> list[VersionReward]:
        """Mean and spread of what was sampled from each version; the last version's samples are not the trainer's."""
        return [
            VersionReward(
                version=line["sampled_version"],
                step=line["step"],
                mean=line["reward_mean"],
                std=line["reward_std"],
                samples=line["samples"],
            )
            for line in self.lines
            if "sampled_version" in line
        ]

    def _is_new(self, line: Line) -> bool:
        key = (line["push"]["epoch"], line["push"]["version"])
        if key in self._known:
            return False
        self._known.add(key)
        return True


def parse(log: str) -> list[Line]:
    """The trainer's own lines in a log."""
    lines = []
    for text in log.splitlines():
        if text.startswith("{"):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # the last line of a log that is being written
            if "push" in line:
                lines.append(line)
    return lines


def is_first_rank(pod: Manifest) -> bool:
    return pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index") == "0"


def has_log(pod: Manifest) -> bool:
    started = pod.get("status", {}).get("containerStatuses", [])
    return any({"running", "terminated"} & each.get("state", {}).keys() for each in started)


def headings() -> str:
    return f"{'version':>7} {'step':>4} {'mean reward':>15} {'push s':>7} {'pause ms':>8} {'GB/s':>6}  digest"


def row(line: Line) -> str:
    """One line of the table: the pushed version, and the reward of the samples that it was learned from."""
    push = line["push"]
    reward = f"{line['reward_mean']:.3f} ± {line['reward_std']:.3f}" if "reward_mean" in line else "(first push)"
    return (
        f"{push['version']:>7} {line['step']:>4} {reward:>15} {push['seconds']:>7.2f} {push['pause_seconds'] * 1e3:>8.0f} "
        f"{push['gbps']:>6.2f}  {push['digest'][:16]}"
    )


def checkpoint_of(lines: Iterable[Line]) -> tuple[int, str] | None:
    """(step, folder) of the last checkpoint that the trainer told of."""
    saved = [(line["step"], line["checkpoint"]) for line in lines if line.get("checkpoint")]
    return saved[-1] if saved else None
