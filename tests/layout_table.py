"""`python -m tests.layout_table`: rewrites docs/layouts.md from the cells that tests/dataplane/test_layouts.py marks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "docs" / "layouts.md"
_SHOWN = {"equal": "equal", "refused": "refused", None: "-"}
_HEAD = """# Source layouts, target layouts, formats

How trainers shard, how engines are parallel, what engines store: each cell is a test (`tests/dataplane/test_layouts.py`) which
compares every byte of every parameter, on every engine rank, with what that rank loads from a checkpoint of the same weights.
Trainers hold fp32 masters in real FSDP2 modules; engines are vLLM's own models and loaders. Written by
`python -m tests.layout_table` from the tests' marks.

- **equal**: all bytes are those of a freshly loaded engine.
- **refused**: before anything moves, by the tensor's name. FP8 scales belong to blocks of 128 by 128, made from whole rows: a
  trainer that parts rows (`Shard(1)` of a matrix: tensor parallelism of output and down projections) cannot make them.
- **-**: there is no such case: a dense model has no experts, and vLLM refuses expert parallelism for it.

Any other mesh of `Replicate`, `Shard` and FSDP2's `_StridedShard` goes the same way (`layout.shards`; property tests draw them).
Refused by name: `Partial`, placements of other kinds, local tensors that are not contiguous or not as torch shards them.
"""


def marked() -> Iterator[tuple[Any, dict[str, str]]]:
    """(model type, the mark's keywords) of each cell."""
    from tests.dataplane.layout_sources import FORMATS
    from tests.dataplane.test_layouts import test_every_byte_is_what_a_fresh_engine_loads as test

    for mark in test.pytestmark:  # type: ignore[attr-defined]
        if mark.name == "parametrize":
            for parameters in mark.args[1]:
                for layout in (each for each in parameters.marks if each.name == "layout"):
                    yield FORMATS[layout.kwargs["format"]][0], layout.kwargs


def rendered() -> str:
    """The document as the marks say."""
    outcomes: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for model_type, mark in marked():
        cells = outcomes.setdefault((mark["format"], model_type), {})
        cells[mark["source"], mark["target"]] = mark["outcome"]
    sources = list(dict.fromkeys(source for cells in outcomes.values() for source, _ in cells))
    targets = list(dict.fromkeys(target for cells in outcomes.values() for _, target in cells))
    lines = [_HEAD]
    for (format_, model_type), cells in outcomes.items():
        lines += [f"## {format_} (`{model_type}`)", "", f"| source | {' | '.join(targets)} |", "|---" * 4 + "|"]
        for source in sources:
            lines.append(f"| {source} | {' | '.join(_SHOWN[cells.get((source, target))] for target in targets)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    TABLE.write_text(rendered())
