"""`python -m tests.failure_modes`: rewrites the last column of docs/failure-modes.md from the marks in the tests."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE = REPOSITORY / "docs" / "failure-modes.md"
_MARK = re.compile(r"failure_mode\((\d+)\)")
_TEST = re.compile(r"^\s*(?:async )?def (test_\w+)")
_ROW = re.compile(r"^\| (\d+) \| (.*?) \| .* \|$")


def marked() -> dict[int, list[str]]:
    """Tests by the row that they guard, as `file::test`; a mark on a module or class counts for its first test."""
    found: dict[int, list[str]] = defaultdict(list)
    for file in sorted([*REPOSITORY.glob("tests/**/test_*.py"), *REPOSITORY.glob("e2e/cluster/test_*.py")]):
        pending: list[int] = []
        for line in file.read_text().splitlines():
            pending += [int(number) for number in _MARK.findall(line)]
            if (test := _TEST.match(line)) is not None:
                for number in pending:
                    found[number].append(f"{file.relative_to(REPOSITORY)}::{test[1]}")
                pending = []
    return found


def rendered() -> str:
    """The document with its last column as the marks say."""
    tests = marked()

    def render(line: str) -> str:
        row = _ROW.match(line)
        if row is None:
            return line
        names = "<br>".join(f"`{name}`" for name in tests.get(int(row[1]), [])) or "not yet"
        return f"| {row[1]} | {row[2]} | {names} |"

    return "\n".join(render(line) for line in TABLE.read_text().splitlines()) + "\n"


if __name__ == "__main__":
    TABLE.write_text(rendered())
