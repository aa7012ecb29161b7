"""Documents that are made from something must equal it."""

from __future__ import annotations

import re

import yaml

from e2e.lab.paths import REPOSITORY
from tests import failure_modes, layout_table
from weightsync_operator.api.names import Condition, Reason

TROUBLESHOOTING = REPOSITORY / "docs" / "troubleshooting.md"
TESTS = REPOSITORY / "docs" / "tests.md"
CONFLICT = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)


def test_the_table_of_failure_modes_names_the_marked_tests() -> None:
    assert failure_modes.TABLE.read_text() == failure_modes.rendered(), "run `python -m tests.failure_modes`"


def test_the_table_of_layouts_has_the_marked_cells() -> None:
    assert layout_table.TABLE.read_text() == layout_table.rendered(), "run `python -m tests.layout_table`"


def test_every_reason_of_a_condition_is_explained() -> None:
    """A reason that users can meet, and no other, has a row of its own."""
    explained = re.findall(r"^\| `(\w+)` \| [A-Z]", TROUBLESHOOTING.read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(reason.value for reason in Reason)


def test_every_field_and_condition_names_tests_that_there_are() -> None:
    """1. each field of the spec, by its section, and each condition has a row; 2. what the rows name can be found."""
    rows = [line.split("|")[1:3] for line in TESTS.read_text().splitlines() if line.startswith("| `")]
    subjects = [name for subject, _ in rows for name in re.findall(r"`([\w.]+)`", subject)]
    assert sorted(subjects) == sorted([*_fields(), *(condition.value for condition in Condition)])
    named = [name for _, shown_by in rows for name in re.findall(r"`([^`]+)`", shown_by)]
    assert len(named) >= len(rows)
    assert [name for name in named if not _is_there(name)] == []


def _fields() -> list[str]:
    """`spec.x.y` of each section, `spec.x` of what is none."""
    schema = yaml.safe_load((REPOSITORY / "charts" / "weightsync" / "files" / "crd.yaml").read_text())
    spec = schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    return [
        ".".join(("spec", name, *inner))
        for name, section in spec.items()
        for inner in ([(key,) for key in section.get("properties", {})] or [()])
    ]


def _is_there(name: str) -> bool:
    file, _, test = name.partition("::")
    path = REPOSITORY / (file if "/" in file else f"tests/controlplane/{file}")
    return path.is_file() and (
        not test or re.search(rf"^(async )?def {test}\(", path.read_text(), re.MULTILINE) is not None
    )


def test_no_document_has_the_marks_of_a_merge() -> None:
    documents = sorted((REPOSITORY / "docs").rglob("*.md")) + sorted(REPOSITORY.glob("*.md"))
    assert documents
    assert not [str(path) for path in documents if CONFLICT.search(path.read_text())]
