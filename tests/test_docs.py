"""Documents that are made from something must equal it."""

from __future__ import annotations

import re

from e2e.lab.paths import REPOSITORY
from tests import failure_modes, layout_table
from weightsync_operator.api.names import Reason

TROUBLESHOOTING = REPOSITORY / "docs" / "troubleshooting.md"
CONFLICT = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)


def test_the_table_of_failure_modes_names_the_marked_tests() -> None:
    assert failure_modes.TABLE.read_text() == failure_modes.rendered(), "run `python -m tests.failure_modes`"


def test_the_table_of_layouts_has_the_marked_cells() -> None:
    assert layout_table.TABLE.read_text() == layout_table.rendered(), "run `python -m tests.layout_table`"


def test_every_reason_of_a_condition_is_explained() -> None:
    """A reason that users can meet, and no other, has a row of its own."""
    explained = re.findall(r"^\| `(\w+)` \| [A-Z]", TROUBLESHOOTING.read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(reason.value for reason in Reason)


def test_no_document_has_the_marks_of_a_merge() -> None:
    documents = sorted((REPOSITORY / "docs").rglob("*.md")) + sorted(REPOSITORY.glob("*.md"))
    assert documents
    assert not [str(path) for path in documents if CONFLICT.search(path.read_text())]
