"""Real ranks with real collectives: their pieces, after a step of training, are what torch itself gathers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dataplane.family_makers import build
from tests.dataplane.gloo_ranks import CASES
from tests.fixtures.servers import free_port
from weightsync.layout.families import family_of
from weightsync.layout.records import SourceLayout

RANKS = 4
TIMEOUT_S = 240
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of every case left; the first failure is shown with its output."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(RANKS),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tests.dataplane.gloo_ranks", str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        told = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, words in zip(ranks, told, strict=True):
        assert rank.returncode == 0, words[-4000:]
    return folder


@pytest.mark.failure_mode(29)
@pytest.mark.failure_mode(6)
@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_the_pieces_of_real_ranks_are_what_torch_gathers(number: int, folder: Path) -> None:
    """1. each rank's pieces, after a step, have the gathered bytes, in the master's dtype; 2. together they are all of it."""
    model = build("qwen3_moe", num_experts=4)
    family, before = family_of(model.config.to_dict()), dict(model.named_parameters())
    gathered = torch.load(folder / f"{number}-gathered.pt")
    assert not any(torch.equal(whole, before[name]) for name, whole in gathered.items() if "gate_up" in name)
    want = {
        name: whole.reshape(-1)[start : start + math.prod(shape)]
        for parameter, whole in gathered.items()
        for name, shape, start in family.parts(parameter, tuple(whole.shape))
    }
    missing = {name: torch.ones(tensor.numel(), dtype=torch.bool) for name, tensor in want.items()}
    for rank in range(RANKS):
        packed, held = torch.load(folder / f"{number}-rank-{rank}.pt")
        layout = SourceLayout.from_bytes(packed)
        assert (layout.rank, {t.name for t in layout.tensors}) == (rank, set(want))
        for name, start, stop, flat in held:
            assert flat.dtype == torch.float32
            assert torch.equal(flat, want[name][start:stop]), (rank, name, start, stop)
            missing[name][start:stop] = False
    assert not any(elements.any() for elements in missing.values())
