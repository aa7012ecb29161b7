"""Any sharding to any sharding: each cell of docs/layouts.md is a test which compares every byte of every parameter.

What the writes of all trainer ranks leave in each rank of vLLM's own model is what that rank loads from a checkpoint of the same
weights. Trainers hold fp32 masters in real FSDP2 and expert-parallel modules; only NIXL and the forward pass are not here.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.dataplane.layout_sources import (
    FORMATS,
    MTP,
    SOURCES,
    TARGETS,
    TRANSFER,
    cells,
    is_refused,
    make_model,
    write_checkpoints,
)
from tests.dataplane.rank_makers import all_ranks
from tests.dataplane.slot_makers import deliver, fill_all
from weightsync.errors import UnsupportedLayout
from weightsync.layout.records import Fill, TargetLayout
from weightsync.layout.shards import LocalSources

TIMEOUT_S = 280
REPOSITORY = Path(__file__).parents[2]
Loaded = Mapping[str, torch.Tensor]
"""Bytes of each parameter, by name."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every target's layout and loaded bytes (tests/dataplane/layout_targets.py)."""
    folder = tmp_path_factory.mktemp("targets")
    write_checkpoints(folder)
    command = [sys.executable, "-m", "tests.dataplane.layout_targets", str(folder), *FORMATS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@functools.lru_cache(maxsize=3)
def trainer(source: str, format_: str) -> list[LocalSources]:
    """What the ranks of a trainer hold; cells of one row share it."""
    n_ranks, parallelize = SOURCES[source]
    return all_ranks(lambda: make_model(format_), n_ranks, parallelize)


def pad(memory: Loaded, fills: tuple[Fill, ...]) -> None:
    """What no rank writes keeps the loader's value."""
    for fill in fills:
        assert fill.value_bits == 0
        elements = memory[fill.target]
        elements[fill.offset : fill.offset + fill.numel] = 0


def cell(source: str, target: str, format_: str):
    outcome = "refused" if is_refused(source, format_) else "equal"
    mark = pytest.mark.layout(source=source, target=target, format=format_, outcome=outcome)
    return pytest.param(source, target, format_, marks=mark, id=f"{source} to {target}, {format_}")


@pytest.mark.vllm
@pytest.mark.failure_mode(9)
@pytest.mark.failure_mode(6)
@pytest.mark.failure_mode(2)
@pytest.mark.failure_mode(1)
@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize(("source", "target", "format_"), [cell(*each) for each in cells()])
def test_every_byte_is_what_a_fresh_engine_loads(source: str, target: str, format_: str, folder: Path) -> None:
    """Seen to fail with `Family.fp32` empty (fp32 router), without buffers (fp32 router, MLA), with one run for all columns of a
    shard (tp 2 x fsdp 2), and with `_StridedShard` split as Shard is (ep 2 x fsdp 2)."""
    engines: dict[str, tuple[TargetLayout, Loaded]] = {}
    for rank in range(TARGETS[target].n_ranks):
        packed, loaded = torch.load(folder / f"{format_}-{target}-{rank}.pt")
        layout = TargetLayout.from_bytes(packed)
        engines[layout.digest()] = (layout, loaded)
    assert len(engines) == TARGETS[target].n_ranks, "each rank wants elements of its own"
    layouts = {digest: layout for digest, (layout, _) in engines.items()}
    if is_refused(source, format_):
        with pytest.raises(UnsupportedLayout, match=r"parts of rows of .* FP8 blocks need whole rows"):
            fill_all(trainer(source, format_), layouts, TRANSFER[format_])
        return
    arenas = fill_all(trainer(source, format_), layouts, TRANSFER.get(format_, "auto"))
    for digest, (layout, loaded) in engines.items():
        memory = deliver(arenas, arenas[0].wants(digest))
        pad(memory, layout.fills)
        assert sorted(memory) == sorted(loaded)
        assert [n for n, found in memory.items() if not torch.equal(found.view(torch.uint8), loaded[n])] == []


@pytest.mark.vllm
@pytest.mark.parametrize("format_", ["fp32 router", "fp32 router, MLA"])
def test_layers_that_the_trainers_module_lacks_are_not_wanted_either(format_: str, folder: Path) -> None:
    """Published checkpoints have a layer that predicts further tokens: offered to the engine's loader, it is left unused."""
    layout = TargetLayout.from_bytes(torch.load(folder / f"{format_}-tp 1-0.pt")[0])
    held = {tensor.name for tensor in trainer("plain", format_)[0].tensors}
    assert set(layout.unused) == set(MTP)
    assert {source.name for source in layout.sources} == held
