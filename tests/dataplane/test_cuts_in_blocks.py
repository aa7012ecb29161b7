"""FP8 matrices that engines cut inside a block of 128 by 128: packed all the same, with the bytes of the engine's own loader."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataplane.refined_engine import Experts
from tests.dataplane.slot_makers import deliver, fill_all, fp8_engine, same, shard
from weightsync.conversion import fp8
from weightsync.errors import ConversionError
from weightsync.layout.packing import in_terms_of, pack
from weightsync.layout.records import TargetLayout
from weightsync.plan import make_plan
from weightsync.slots import SlotArena

SETTINGS = settings(max_examples=15, deadline=None, derandomize=True)
QWEN3_30B = Experts(count=4, hidden=256, inner=768, tp=8, block=32)
"""Shares of 96 rows and columns, as at TP 8; two of the matrices' 16 blocks of hidden."""


def layouts_of(experts: Experts) -> dict[str, TargetLayout]:
    return {layout.digest(): layout for layout in map(experts.layout, range(experts.tp))}


def require_loaded(experts: Experts, arenas: list[SlotArena], weights: dict[str, torch.Tensor], ue8m0: bool) -> None:
    """Every byte of every rank is that of its own loader."""
    for rank, digest in enumerate(layouts_of(experts)):
        memory = deliver(arenas, arenas[0].wants(digest))
        for name, wanted in experts.loaded(rank, weights, ue8m0=ue8m0).items():
            assert same(memory[name].view(wanted.shape), wanted), (rank, name)


@st.composite
def experts_of(draw: st.DrawFn) -> Experts:
    block, tp = draw(st.sampled_from([16, 32, 64])), draw(st.integers(2, 4))
    inner, hidden = tp * block * draw(st.integers(1, 5)), block * draw(st.integers(1, 5))
    return Experts(count=draw(st.integers(1, 2)), hidden=hidden, inner=inner, tp=tp, block=block)


@pytest.mark.failure_mode(4)
@SETTINGS
@given(
    experts_of(), st.integers(1, 3), st.sampled_from(["auto", "fp8-128x128-ue8m0"]), st.sampled_from([1 << 10, 1 << 28])
)
def test_any_cut_has_the_bytes_of_the_engines_own_loader(
    experts: Experts, ranks: int, format_: str, group_bytes: int
) -> None:
    """Shares that end in blocks or at their ends, whole matrices on each rank or blocks that straddle ranks.

    Seen to fail with slices quantized by the greatest element of their own columns instead of the whole block's.
    """
    weights = experts.weights(seed=ranks)
    arenas = fill_all(shard(weights, ranks), layouts_of(experts), format_, group_bytes=group_bytes)
    require_loaded(experts, arenas, weights, format_.endswith("ue8m0"))


def test_writes_are_as_many_as_the_parts_that_an_engine_stores() -> None:
    """Four experts: gate and up a write each, and their scales; down and its scales one write each for all. By rows: 2,000."""
    held = [local.layout(rank) for rank, local in enumerate(shard(QWEN3_30B.weights(0), 1))]
    layouts = layouts_of(QWEN3_30B)
    arenas = fill_all(shard(QWEN3_30B.weights(0), 1), layouts)
    for digest in layouts:
        assert len(make_plan(arenas[0].layouts, arenas[0].wants(digest)).writes(0)) <= 4 * 2 * 2 + 2
    blocks = {
        part.block for parts in pack(layouts, held).columns.values() for part in parts if "scale" not in part.name
    }
    assert blocks == {(32, 32)}


def test_a_later_engine_is_served_where_it_reads_the_same_grid() -> None:
    """TP 4 keeps 192 columns in parts of 64: its scales are not there, and neither are those of an engine with whole blocks."""
    eight = layouts_of(QWEN3_30B)
    (local,) = shard(QWEN3_30B.weights(0), 1)
    packed = pack(eight, [local.layout(0)])
    for digest, layout in eight.items():
        assert in_terms_of(packed.columns, layout) == packed.layouts[digest]
    four = dataclasses.replace(QWEN3_30B, tp=4, block=64)
    assert in_terms_of(packed.columns, four.layout(1)) is None
    assert in_terms_of(packed.columns, fp8_engine(QWEN3_30B.shapes(), {})) is None


def test_engines_that_refine_in_other_ways_get_the_right_bytes_too() -> None:
    """One in parts of 32, one in whole blocks: nothing is packed, everything arrives."""
    whole, weights = fp8_engine(QWEN3_30B.shapes(), {}), QWEN3_30B.weights(1)
    arenas = fill_all(shard(weights, 2), layouts_of(QWEN3_30B) | {whole.digest(): whole})
    require_loaded(QWEN3_30B, arenas, weights, ue8m0=False)
    memory = deliver(arenas, arenas[0].wants(whole.digest()))
    for name, weight in weights.items():
        assert same(memory[f"p.{name}"].view(weight.shape), fp8.quantize(weight, fp8.scales_of(fp8.block_amax(weight))))


def test_a_nan_is_named_by_its_place_in_the_matrix() -> None:
    weights = QWEN3_30B.weights(0)
    weights["experts.2.down"][200, 300] = float("nan")
    with pytest.raises(ConversionError, match=r"experts.2.down: .* the first at \[200, 300\]"):
        fill_all(shard(weights, 1), layouts_of(QWEN3_30B))
