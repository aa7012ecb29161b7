"""Live vLLM models (CPU build) are traced, and a push by the record equals a load by vLLM's own loader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weightsync.inspection.checkpoint import read_checkpoint
from weightsync.inspection.run import trace
from weightsync.inspection.tracing import Refusal
from weightsync.layout.meshes import EngineMesh

START_TIMEOUT_S = 300
REPOSITORY = Path(__file__).parents[2]


def probe(model: str, folder: Path) -> dict[str, Any]:
    """The verdict of `vllm_trace_probe`; its output is shown when it fails."""
    command = [sys.executable, "-m", "tests.dataplane.vllm_trace_probe", model, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith('{"written'))


@pytest.mark.vllm
@pytest.mark.failure_mode(3)
@pytest.mark.timeout(START_TIMEOUT_S + 120)
@pytest.mark.parametrize(
    ("model", "fused", "n_padded"),
    [
        ("llama", "model.layers.0.mlp.gate_up_proj.weight", 12),
        ("qwen3_moe", "model.layers.1.mlp.experts.routed_experts.w13_weight", 24),
    ],
)
def test_a_live_model_is_traced_and_a_push_equals_a_load(model: str, fused: str, n_padded: int, tmp_path: Path) -> None:
    """1. tracing writes nothing; 2. every parameter is a target; 3. padded rows are fills; 4. all bits are equal;

    5. a child process that has no weights and no memory for them tells the same layout.
    """
    found = probe(model, tmp_path)
    assert found["written_by_trace"] == []
    assert found["targets"] == found["parameters"]
    assert fused in found["targets"]
    assert (found["unused"], found["copies"]) == ([], found["sources"])
    assert found["fills"] == n_padded * 128
    assert found["differing"] == []
    traces = trace(read_checkpoint(tmp_path), EngineMesh(tensor=1), "bf16", [0])
    assert not isinstance(traces, Refusal), traces
    assert (traces[0].layout.digest(), traces[0].faults) == (found["digest"], {})
