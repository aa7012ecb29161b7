"""Log lines as JSON: one object a line, with the resource that it is about."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from weightsync_operator import logs
from weightsync_operator.cluster import ApiError
from weightsync_operator.workers import Workers


class _Lines(logging.Handler):
    """Keeps formatted lines."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logs.JsonFormatter())
        self.lines: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        assert "\n" not in line
        self.lines.append(json.loads(line))


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, object]]]:
    handler = _Lines()
    logging.getLogger().addHandler(handler)
    with caplog.at_level(logging.INFO):
        yield handler.lines
    logging.getLogger().removeHandler(handler)


def test_a_line_of_the_process_names_no_resource(lines: list[dict[str, object]]) -> None:
    logging.getLogger("weightsync_operator").info("started, %d of them", 2)
    (line,) = lines
    assert (line["level"], line["logger"], line["message"]) == ("info", "weightsync_operator", "started, 2 of them")
    assert "name" not in line
    assert str(line["time"]).endswith("+00:00")


def test_every_line_of_a_pass_names_its_resource(lines: list[dict[str, object]]) -> None:
    async def reconcile(key: tuple[str, str]) -> float | None:
        logging.getLogger("anything").info("below")
        raise ApiError(500, "broken", {}) if key[1] == "a" else KeyError("bug")

    async def scenario() -> None:
        workers = Workers(reconcile)
        workers.poke(("ns", "a"))
        workers.poke(("ns", "b"))
        async with asyncio.timeout(10):
            while len(lines) < 4:  # noqa: ASYNC110 - a log line is no event
                await asyncio.sleep(0.01)
        await workers.close()

    asyncio.run(scenario())
    assert {(line["namespace"], line["name"]) for line in lines} == {("ns", "a"), ("ns", "b")}
    (bug,) = [line for line in lines if "exception" in line]
    assert bug["name"] == "b"
    assert "KeyError: 'bug'" in str(bug["exception"])


def test_kopfs_lines_name_the_object_that_they_are_about(lines: list[dict[str, object]]) -> None:
    logging.getLogger("kopf.objects").warning("slow", extra={"k8s_ref": {"namespace": "ns", "name": "pod-0"}})
    assert (lines[0]["namespace"], lines[0]["name"]) == ("ns", "pod-0")
