"""Documents that are made from something must equal it."""

from __future__ import annotations

from tests import failure_modes, layout_table


def test_the_table_of_failure_modes_names_the_marked_tests() -> None:
    assert failure_modes.TABLE.read_text() == failure_modes.rendered(), "run `python -m tests.failure_modes`"


def test_the_table_of_layouts_has_the_marked_cells() -> None:
    assert layout_table.TABLE.read_text() == layout_table.rendered(), "run `python -m tests.layout_table`"
