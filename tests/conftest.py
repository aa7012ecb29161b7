"""What all tests share: fixtures of the bare API server, marks, and the list of allowed skips."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["tests.fixtures.apiserver"]

SKIPS = Path(__file__).parent / "skips.txt"
"""One `node id: reason` a line; a skip that is not in it fails the run."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_seen] = set()


_seen = pytest.StashKey[set[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        _note_skip(item, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if report.skipped:
        _note_skip(collector, report)
    return report


def _note_skip(node: pytest.Item | pytest.Collector, report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    node.config.stash[_seen].add(f"{node.nodeid}: {reason.removeprefix('Skipped: ')}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hold what was skipped against the checked-in list."""
    lines = SKIPS.read_text().splitlines() if SKIPS.exists() else []
    allowed = {line for line in lines if line and not line.startswith("#")}
    unexpected = sorted(session.config.stash[_seen] - allowed)
    if unexpected:
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        for line in unexpected:
            terminal.write_line(f"skipped, but not in {SKIPS.name}: {line}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
