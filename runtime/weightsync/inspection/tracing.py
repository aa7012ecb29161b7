"""Asks a child process what ranks of an engine want. vLLM is never imported here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from weightsync.errors import ConfigError, WeightSyncError
from weightsync.layout.meshes import EngineMesh
from weightsync.layout.records import SourceTensor, TargetLayout

CHILD = "weightsync.vllm.offline"
TIMEOUT_S = 3600.0
REFUSED = "refused"
UNTRACEABLE = "untraceable"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Which ranks the child is to trace, of what."""

    model: str
    """Folder with a config.json."""
    tensor_parallel: int
    data_parallel: int
    expert_parallel: bool
    redundant_experts: int
    ranks: Sequence[int]
    """Of tensor_parallel * data_parallel, as `EngineMesh` numbers them."""
    out: str
    """Folder for what it finds."""
    sources: Sequence[SourceTensor]
    """The checkpoint's tensors in the dtypes that it has."""

    @property
    def world(self) -> int:
        return self.tensor_parallel * self.data_parallel

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        value = json.loads(text)
        sources = [SourceTensor(s["name"], tuple(s["shape"]), s["dtype"]) for s in value.pop("sources")]
        return cls(**value, sources=sources)


@dataclasses.dataclass(frozen=True)
class RankTrace:
    """What one rank of an engine wants."""

    layout: TargetLayout
    faults: Mapping[str, str]
    """Parameters that the layout leaves out, and why."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a rank has no layout."""

    rank: int
    kind: str
    """`refused`: vLLM does not build the model in this size; `untraceable`: its loader could not be followed at all."""
    message: str


def trace_ranks(
    *,
    config: Mapping[str, Any],
    engine: EngineMesh,
    sources: Sequence[SourceTensor],
    ranks: Sequence[int],
    timeout_s: float = TIMEOUT_S,
) -> Mapping[int, RankTrace] | Refusal:
    """Each rank's trace, or the first refusal.

    Raises ConfigError when this environment has no vLLM, WeightSyncError with the end of its output when the child fails.
    """
    with TemporaryDirectory(prefix="weightsync-inspect-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        job = Job(
            model=folder,
            tensor_parallel=engine.tensor,
            data_parallel=engine.data,
            expert_parallel=engine.expert_parallel,
            redundant_experts=engine.redundant_experts,
            ranks=list(ranks),
            out=folder,
            sources=sources,
        )
        _run_child(job, timeout_s)
        return _collect(Path(folder), ranks)


def _run_child(job: Job, timeout_s: float) -> None:
    command = [sys.executable, "-m", CHILD]
    try:
        done = subprocess.run(
            command,
            input=job.to_json(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise WeightSyncError(f"tracing took more than {timeout_s:.0f} s: trace fewer ranks (--ranks 3)") from error
    if "No module named 'vllm'" in done.stdout:
        raise ConfigError(
            "vLLM is not installed here, and its own loader says what an engine wants: pip install vllm==0.32.0"
        )
    if done.returncode:
        raise WeightSyncError(f"{CHILD} ended with status {done.returncode}: {done.stdout[-2000:]}")


def _collect(folder: Path, ranks: Sequence[int]) -> Mapping[int, RankTrace] | Refusal:
    traces = {}
    for rank in ranks:
        refused = folder / f"{rank}.error"
        if refused.exists():
            return Refusal(rank=rank, **json.loads(refused.read_text()))
        layout = TargetLayout.from_bytes((folder / f"{rank}.layout").read_bytes())
        traces[rank] = RankTrace(layout, json.loads((folder / f"{rank}.faults").read_text()))
    return traces
