"""`weightsync inspect`: make a push's plan and count it, with no weights, no GPU and no cluster."""

from __future__ import annotations

import json
import sys

import click

from weightsync.inspection.checkpoint import FORMATS

HELP = """Plan a push of MODEL and count it: no weights, no GPU, no cluster.

MODEL is a model's folder, or a config.json alone. vLLM's own loader is traced for every rank of one engine replica, in a
child process; the plan that a trainer would make is made and proved complete.

\b
--trainer   fsdp=8           FSDP2 over 8 ranks
            hsdp=2x32        2 replicas of 32 shards
            fsdp=16,ep=4     64 ranks: experts over 4, each part over 16
--engine    tp=8             tensor parallel
            tp=8,ep          the same 8 ranks, whole experts on each
            tp=8,dp=4,ep     32 ranks, experts over all of them
            tp=8,ep,redundant=8   with 8 more copies of experts

\b
Example:
  weightsync inspect ./Qwen3-30B-A3B --trainer hsdp=2x32 --engine tp=8,ep --format fp8

Exit codes: 0 there is a plan; 1 there is none, and the output says why; 2 the question is wrong.
"""


@click.command("inspect", help=HELP)
@click.argument("model", type=click.Path())
@click.option("--trainer", required=True, metavar="MESH", help="Axes of the trainer.")
@click.option("--engine", required=True, metavar="MESH", help="Axes of one engine replica.")
@click.option(
    "--format", "format_", type=click.Choice(FORMATS), default="bf16", show_default=True, help="What the engine serves."
)
@click.option(
    "--fabric-gbps",
    type=click.FloatRange(min=0, min_open=True),
    default=400.0,
    show_default=True,
    help="Gigabits a second of a rank's link.",
)
@click.option(
    "--ranks", type=click.IntRange(min=1), help="Trace that many engine ranks instead of all; sums are then estimates."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of text.")
def command(
    model: str, trainer: str, engine: str, format_: str, fabric_gbps: float, ranks: int | None, as_json: bool
) -> None:
    from weightsync.inspection.run import Question, inspect  # numpy, and torch for a config.json: not for --help

    question = Question(model=model, trainer=trainer, engine=engine, format=format_, fabric_gbps=fabric_gbps)
    found = inspect(question, n_ranks=ranks)
    click.echo(json.dumps(found.document()) if as_json else found.text())
    sys.exit(0 if found.ok else 1)
