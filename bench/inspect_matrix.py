"""Plans of full-size models, offline: `python -m bench.inspect_matrix [--missing] [--models NAME ...] [--ranks N | --ranks all]`.

Each cell is one `weightsync inspect`: model x trainer x engine x format. An engine's ranks are traced once and serve every trainer.
Cells are stored, with the table in docs/inspect.md, after each engine and format: a run that ends goes on with `--missing`. Earlier
cells that are not asked for again are kept. Leaves bench/results/inspect_matrix.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.about import about, save
from weightsync.errors import WeightSyncError
from weightsync.inspection.checkpoint import FORMATS, Checkpoint, read_checkpoint
from weightsync.inspection.figures import sampled
from weightsync.inspection.report import Inspection
from weightsync.inspection.run import Question, conclude, trace
from weightsync.inspection.tracing import Refusal
from weightsync.layout.meshes import EngineMesh, TrainerMesh

ROOT = Path(__file__).parents[1]
MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b", "glm-4.5", "deepseek-v3", "glm-5")
TRAINERS = ("fsdp=8", "fsdp=64", "hsdp=2x32", "fsdp=16,ep=4")
ENGINES = ("tp=8", "tp=8,ep", "tp=8,dp=4,ep")
FABRIC_GBPS = 400.0
RESULTS = ROOT / "bench" / "results" / "inspect_matrix.json"
PAGE = ROOT / "docs" / "inspect.md"
BEGIN, END = "<!-- made by bench/inspect_matrix.py -->\n", "<!-- end -->\n"
COMMAND = "python -m bench.inspect_matrix --ranks 2 --models MODEL --engines ENGINE --formats FORMAT"
"""Cells are run a few at a time; each says its commit."""
KEY = ("model", "engine", "format", "trainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--ranks", default="3", help="engine ranks to trace: a number, or `all`")
    parser.add_argument("--missing", action="store_true", help="leave out what is stored for every trainer")
    options = parser.parse_args()
    n_ranks = None if options.ranks == "all" else int(options.ranks)
    cells = {key_of(cell): cell for cell in stored()}
    asked = [*itertools.product(options.models, options.engines, options.formats)]
    if options.missing:
        asked = [each for each in asked if any((*each, trainer) not in cells for trainer in TRAINERS)]
    checkpoints: dict[str, Checkpoint] = {}
    for number, (model, engine, format_) in enumerate(asked, 1):
        print(f"{number} of {len(asked)}: {model} {engine} {format_} ...", file=sys.stderr, flush=True)
        if model not in checkpoints:
            checkpoints = {model: read_checkpoint(ROOT / "bench" / "configs" / f"{model}.json")}
        for cell in run(model, checkpoints[model], engine, format_, n_ranks):
            cells[key_of(cell)] = cell
            print(line(cell), flush=True)
        write([cells[key] for key in sorted(cells)])


def run(model: str, checkpoint: Checkpoint, engine: str, format_: str, n_ranks: int | None) -> Iterator[dict[str, Any]]:
    """One cell a trainer."""
    mesh = EngineMesh.parse(engine)
    started = time.perf_counter()
    try:
        traces = trace(checkpoint, mesh, format_, sampled(mesh.ranks, n_ranks))
    except WeightSyncError as error:
        traces = Refusal(rank=0, kind="untraceable", message=str(error))
    trace_s = time.perf_counter() - started
    for trainer in TRAINERS:
        question = Question(model=model, trainer=trainer, engine=engine, format=format_, fabric_gbps=FABRIC_GBPS)
        started = time.perf_counter()
        found = conclude(question, checkpoint, TrainerMesh.parse(trainer), mesh, traces)
        yield row(found, trace_s, time.perf_counter() - started)


def row(found: Inspection, trace_s: float, plan_s: float) -> dict[str, Any]:
    """`trace_s` is shared by the cells of one engine and format; `plan_s` is for all of the cell's traced engine ranks."""
    cell: dict[str, Any] = {
        "model": found.model,
        "trainer": found.trainer,
        "engine": found.engine,
        "format": found.format,
        "trace_s": round(trace_s, 1),
        "plan_s": round(plan_s, 1),
        "commit": about()["commit"],
    }
    figures = found.figures
    if figures is None:
        refusal = found.refusal
        return {**cell, "ok": False, "message": refusal.message if refusal is not None else found.no_plan}
    return {
        **cell,
        "ok": True,
        "vllm": found.traced_with.get("vllm"),
        "platform": found.traced_with.get("platform"),
        "engine_ranks_traced": list(figures.engine_ranks_traced),
        "engine_ranks": figures.engine_ranks,
        "covered_elements": figures.covered_elements,
        "padding_elements": figures.padding_elements,
        "fallbacks": len(figures.fallbacks),
        "bytes_an_engine_rank": figures.engine_bytes_received.most,
        "bytes_a_trainer_rank": figures.trainer_bytes_sent.most,
        "arena_bytes_a_trainer_rank": figures.trainer_arena_bytes.most,
        "writes_an_engine_rank": figures.writes_an_engine_rank.most,
        "writes_a_peer": figures.writes_a_peer.most,
        "mean_write_bytes": figures.mean_write_bytes,
        "expected_seconds": round(figures.seconds(FABRIC_GBPS), 4),
    }


def key_of(cell: dict[str, Any]) -> tuple[str, ...]:
    return tuple(cell[name] for name in KEY)


def line(cell: dict[str, Any]) -> str:
    told = f"{cell['writes_an_engine_rank']} writes an engine rank" if cell["ok"] else cell["message"]
    return f"{' '.join(key_of(cell))}: {told} (trace {cell['trace_s']} s, plan {cell['plan_s']} s)"


def stored() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else []


def write(cells: Sequence[dict[str, Any]]) -> None:
    """The results, and the table made from them."""
    machine = {name: value for name, value in about().items() if name not in ("command", "commit")}
    report = {"about": machine, "command": COMMAND, "fabric_gbps": FABRIC_GBPS, "cells": list(cells)}
    save(RESULTS.stem, report, RESULTS.parent)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n" + table(cells) + "\n" + END + after)


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: cells with a plan, then what was refused."""
    planned = [cell for cell in cells if cell["ok"]]
    lines = [
        "| Model | Trainer | Engine | Format | Ranks traced | GB an engine rank | Writes an engine rank | Bytes a write "
        "| GB a trainer rank sends | Arena GB | Seconds | Plan s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in planned:
        traced = f"{len(c['engine_ranks_traced'])} of {c['engine_ranks']}"
        gigabytes = [c[n] / 1e9 for n in ("bytes_an_engine_rank", "bytes_a_trainer_rank", "arena_bytes_a_trainer_rank")]
        lines.append(
            f"| {c['model']} | {c['trainer']} | {c['engine']} | {c['format']} | {traced} | {gigabytes[0]:.2f} | "
            f"{c['writes_an_engine_rank']:,} | {c['mean_write_bytes']:,} | {gigabytes[1]:.2f} | {gigabytes[2]:.2f} | "
            f"{c['expected_seconds']:.3f} | {c['plan_s']} |"
        )
    refused = sorted({(c["model"], c["engine"], c["format"], c["message"]) for c in cells if not c["ok"]})
    lines += ["", "No plan, whatever the trainer:", ""] if refused else []
    lines += [f"- {model}, {engine}, {format_}: `{message}`" for model, engine, format_, message in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
