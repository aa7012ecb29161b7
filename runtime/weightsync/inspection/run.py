"""One inspection from start to end: read the model, trace the engine's ranks, plan, count."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsync.errors import PlanError
from weightsync.inspection.checkpoint import Checkpoint, read_checkpoint
from weightsync.inspection.figures import count, sampled
from weightsync.inspection.report import Inspection
from weightsync.inspection.tracing import RankTrace, Refusal, trace_ranks
from weightsync.layout.meshes import EngineMesh, TrainerMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be inspected, in the words of the command line."""

    model: str
    trainer: str
    engine: str
    format: str
    fabric_gbps: float


def inspect(question: Question, *, n_ranks: int | None = None) -> Inspection:
    """`n_ranks`: how many engine ranks to trace; None traces all.

    Raises ConfigError for what a user may have got wrong, UnsupportedLayout for a family that is not known.
    """
    trainer, engine = TrainerMesh.parse(question.trainer), EngineMesh.parse(question.engine)
    checkpoint = read_checkpoint(Path(question.model))
    traces = trace(checkpoint, engine, question.format, sampled(engine.ranks, n_ranks))
    return conclude(question, checkpoint, trainer, engine, traces)


def trace(
    checkpoint: Checkpoint, engine: EngineMesh, format_: str, ranks: Sequence[int]
) -> Mapping[int, RankTrace] | Refusal:
    """What these ranks want of a checkpoint in this format."""
    return trace_ranks(
        config=checkpoint.engine_config(format_), engine=engine, sources=checkpoint.sources(format_), ranks=ranks
    )


def conclude(
    question: Question,
    checkpoint: Checkpoint,
    trainer: TrainerMesh,
    engine: EngineMesh,
    traces: Mapping[int, RankTrace] | Refusal,
) -> Inspection:
    """Plan and count; the same traces serve any trainer mesh."""
    sources = checkpoint.sources(question.format)
    found = Inspection(
        **dataclasses.asdict(question),
        architecture=checkpoint.config["architectures"][0],
        elements=checkpoint.numel,
        tensors=len(sources),
        learnt_from=checkpoint.learnt_from,
        trainer_ranks=trainer.ranks,
        engine_ranks=engine.ranks,
        traced_with={},
    )
    if isinstance(traces, Refusal):
        return dataclasses.replace(found, refusal=traces)
    found = dataclasses.replace(found, traced_with=dict(next(iter(traces.values())).layout.meta))
    try:
        figures = count(
            parameters=checkpoint.parameters,
            sources=sources,
            trainer=trainer,
            engine=engine,
            layouts={rank: each.layout for rank, each in traces.items()},
            faults={name: reason for each in traces.values() for name, reason in each.faults.items()},
        )
    except PlanError as error:
        return dataclasses.replace(found, no_plan=str(error))
    return dataclasses.replace(found, figures=figures)
