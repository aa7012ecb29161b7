"""A rank's arena on the GPU has the bytes of one on the host: FP8, scales, casts, blocks that straddle ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from tests.dataplane.refined_engine import Experts
from tests.dataplane.slot_makers import deliver, engine, fill_all, fp8_engine, same, shard
from weightsync.errors import ConversionError
from weightsync.layout.records import ITEM_BYTES, SourceTensor, TargetLayout
from weightsync.meter import WritesMeter
from weightsync.plan import make_plan
from weightsync.slots import SlotArena


@pytest.mark.parametrize("format_", ["auto", "fp8-128x128-ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_same_bytes_as_on_the_host(format_: str, dtype: torch.dtype, ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    shapes = {"a": (300, 256), "b": (128, 130), "c": (1000, 64)}
    weights = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    weights |= {
        "norm": torch.randn(300, generator=generator).to(dtype),
        "router": torch.randn(300, generator=generator).to(dtype),
    }
    layout = fp8_engine(shapes, {"norm": "bfloat16", "router": "float32"})
    host = deliver(fill_all(shard(weights, ranks), layout, format_), layout)
    device = deliver(fill_all(shard({k: v.cuda() for k, v in weights.items()}, ranks), layout, format_), layout)
    for name, memory in host.items():
        assert same(memory, device[name]), name


@pytest.mark.parametrize("name", ["a", "norm"])
def test_a_nan_is_named(name: str) -> None:
    weights = {"a": torch.randn(256, 256).cuda(), "norm": torch.randn(300).cuda()}
    weights[name].view(-1)[77] = float("nan")
    with pytest.raises(ConversionError, match=f"1 tensors have an infinity or a NaN, such as {name}:"):
        fill_all(shard(weights, 1), fp8_engine({"a": (256, 256)}, {"norm": "bfloat16"}))


@pytest.mark.parametrize("bad", ["experts.1.gate", "experts.0.down", "norm"])
def test_a_nan_is_named_beside_slices_that_end_inside_blocks(bad: str) -> None:
    """Whole blocks, slices and casts are launches of their own: each flag belongs to its own name."""
    experts = Experts(count=2, hidden=256, inner=768, tp=8, block=32)
    layouts = {layout.digest(): layout for layout in map(experts.layout, range(experts.tp))}
    plain = fp8_engine({"a": (256, 256)}, {"norm": "bfloat16"})
    weights = experts.weights(seed=0) | {"a": torch.randn(256, 256), "norm": torch.randn(300)}
    weights = {name: weight.cuda() for name, weight in weights.items()}
    weights[bad].view(-1)[77] = float("nan")
    with pytest.raises(ConversionError, match=f"1 tensors have an infinity or a NaN, such as {bad}:"):
        fill_all(shard(weights, 1), layouts | {plain.digest(): plain})


def test_an_arena_is_filled_again_after_a_step_and_after_the_model_moved() -> None:
    weights = {"a": torch.randn(256, 256).cuda()}
    layout = fp8_engine({"a": (256, 256)}, {})
    (local,) = shard(weights, 1)
    arenas = fill_all([local], layout)
    local.pieces[0].parameter.mul_(2.0)
    arenas[0].fill()
    doubled = deliver(arenas, layout)
    (fresh,) = shard({"a": weights["a"] * 2}, 1)
    assert same(doubled["p.a"], deliver(fill_all([fresh], layout), layout)["p.a"])
    moved = local.pieces[0].parameter.clone().mul_(3.0)
    local.pieces[0].parameter.set_(moved.untyped_storage(), 0, moved.shape)
    arenas[0].fill()
    (fresh,) = shard({"a": moved}, 1)
    assert same(deliver(arenas, layout)["p.a"], deliver(fill_all([fresh], layout), layout)["p.a"])


@pytest.mark.parametrize("ranks", [1, 3])
def test_slices_that_end_inside_blocks_have_the_bytes_of_the_host(ranks: int) -> None:
    experts = Experts(count=2, hidden=256, inner=768, tp=8, block=32)
    layouts = {layout.digest(): layout for layout in map(experts.layout, range(experts.tp))}
    weights = experts.weights(seed=ranks)
    arenas = fill_all(shard({name: weight.cuda() for name, weight in weights.items()}, ranks), layouts)
    for rank, digest in enumerate(layouts):
        memory = deliver(arenas, arenas[0].wants(digest))
        for name, wanted in experts.loaded(rank, weights, ue8m0=False).items():
            assert same(memory[name].view(wanted.shape), wanted), (rank, name)


def test_what_nothing_converts_is_read_where_the_model_keeps_it() -> None:
    """1. the same bytes and the same digests as with an arena for all; 2. what a group reads in place takes no memory."""
    weights = {"a": torch.randn(256, 256), "norm": torch.randn(300), "bias": torch.randn(300)}
    weights = {name: weight.cuda().bfloat16() for name, weight in weights.items()}
    layout = fp8_engine({"a": (256, 256)}, {"norm": "bfloat16", "bias": "float32"})
    found = {zero_copy: _delivered(weights, layout, zero_copy) for zero_copy in (False, True)}
    assert found[False] == found[True]
    plain = engine([SourceTensor("norm", (300,), "bfloat16")])
    (local,) = shard({"norm": weights["norm"]}, 1)
    arena = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto", zero_copy=True)
    assert arena.lay_out({plain.digest(): plain})
    arena.fill()
    assert arena.buffer.numel() == 1


def _delivered(weights: dict[str, torch.Tensor], layout: TargetLayout, zero_copy: bool) -> tuple[Any, Any]:
    """(bytes by target, digests by target index) of what a rank writes."""
    (local,) = shard(weights, 1)
    arena = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto", zero_copy=zero_copy)
    assert arena.lay_out({layout.digest(): layout})
    arena.fill()
    plan = make_plan(arena.layouts, arena.wants(layout.digest()))
    sizes = np.array([ITEM_BYTES[target.dtype] for target in plan.targets])
    parts = arena.parts(plan.writes(0), sizes)
    meters = [WritesMeter(group, plan.targets) for group in parts]
    for meter in meters:
        meter.launch()
    found: dict[tuple[int, int], list[int]] = {}
    for memory, writes in (part for group in parts for part in group):
        for slot, index, offset, length in writes.tolist():
            size = int(sizes[index])
            for row in range(length):
                here = (slot + row) * size
                found[index, offset + row] = memory[here : here + size].tolist() if row % 64 == 0 else []
    return found, WritesMeter.read(meters)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_fault_in_what_is_read_in_place_is_named(bad: float) -> None:
    weights = {"a": torch.randn(64, 64).cuda().bfloat16(), "b": torch.randn(64, 64).cuda().bfloat16()}
    weights["b"][5, 7] = bad
    layout = engine([SourceTensor(name, (64, 64), "bfloat16") for name in weights])
    (local,) = shard(weights, 1)
    arena = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto", zero_copy=True)
    assert arena.lay_out({layout.digest(): layout})
    with pytest.raises(ConversionError, match="1 tensors have an infinity or a NaN, such as b:"):
        arena.fill()
