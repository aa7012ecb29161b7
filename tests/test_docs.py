"""Documents that are made from something must equal it."""

from __future__ import annotations

from tests.failure_modes import TABLE, rendered


def test_the_table_of_failure_modes_names_the_marked_tests() -> None:
    assert TABLE.read_text() == rendered(), "run `python -m tests.failure_modes`"
