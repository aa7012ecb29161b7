"""Matrices that engines want in column slices: carried slice by slice, the same bytes in one write instead of one a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataplane.slot_makers import deliver, fill_all, same, shard
from weightsync.conversion import fp8
from weightsync.layout.arenas import Carrier
from weightsync.layout.forms import BLOCK, SCALE_SUFFIX, scale_grid, wanted_of
from weightsync.layout.packing import in_terms_of, pack
from weightsync.layout.records import Copy, Holding, SourceLayout, SourceTensor, Target, TargetLayout
from weightsync.layout.shards import LocalSources
from weightsync.plan import make_plan
from weightsync.slots import SlotArena

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def row_parallel(shapes: dict[str, tuple[int, int]], tp: int, rank: int, dtype: str) -> TargetLayout:
    """An engine rank that wants columns [rank * width, (rank + 1) * width) of each matrix, stacked as experts are."""
    sources, targets, copies = [], [], []
    for name, (rows, columns) in shapes.items():
        width = columns // tp
        sources.append(SourceTensor(name, (rows, columns), dtype))
        targets.append(Target(f"p.{name}", (rows, width), dtype))
        copies.append(Copy(name, rank * width, (columns, 1), f"p.{name}", 0, (width, 1), (rows, width)))
        if dtype == "float8_e4m3fn":
            grid = scale_grid((rows, columns))
            part = width // BLOCK
            sources.append(SourceTensor(name + SCALE_SUFFIX, grid, "float32"))
            targets.append(Target(f"p.{name}{SCALE_SUFFIX}", (grid[0], part), "float32"))
            view = (f"p.{name}{SCALE_SUFFIX}", 0, (part, 1), (grid[0], part))
            copies.append(Copy(name + SCALE_SUFFIX, rank * part, (grid[1], 1), *view))
    return TargetLayout(targets=tuple(targets), sources=tuple(sources), copies=tuple(copies))


def delivered(arenas: list[SlotArena], layouts: dict[str, TargetLayout]) -> list[dict[str, torch.Tensor]]:
    return [deliver(arenas, arenas[0].wants(digest)) for digest in layouts]


@SETTINGS
@given(
    st.integers(1, 4),
    st.integers(2, 4),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 3)), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([1 << 10, 1 << 28]),
)
def test_every_slice_has_the_bytes_of_the_whole_conversion(
    ranks: int, tp: int, sizes: list[tuple[int, int]], quantized: bool, group_bytes: int
) -> None:
    unit = BLOCK if quantized else 3
    shapes = {f"w{i}": (rows, tp * unit * blocks) for i, (rows, blocks) in enumerate(sizes)}
    generator = torch.Generator().manual_seed(tp)
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    dtype = "float8_e4m3fn" if quantized else "bfloat16"
    layouts = {layout.digest(): layout for layout in (row_parallel(shapes, tp, rank, dtype) for rank in range(tp))}
    arenas = fill_all(shard(weights, ranks), layouts, group_bytes=group_bytes)
    for number, memory in enumerate(delivered(arenas, layouts)):
        for name, (rows, columns) in shapes.items():
            mine = slice(number * columns // tp, (number + 1) * columns // tp)
            if not quantized:
                assert same(memory[f"p.{name}"].view(rows, -1), weights[name][:, mine].to(torch.bfloat16))
                continue
            scales = fp8.scales_of(fp8.block_amax(weights[name]))
            assert same(memory[f"p.{name}"].view(rows, -1), fp8.quantize(weights[name], scales)[:, mine])
            blocks = slice(mine.start // BLOCK, mine.stop // BLOCK)
            assert same(memory[f"p.{name}{SCALE_SUFFIX}"].view(len(scales), -1), scales[:, blocks])


def test_a_slice_of_many_rows_is_one_write() -> None:
    shapes = {"w": (1000, 256)}
    layouts = {layout.digest(): layout for layout in (row_parallel(shapes, 2, rank, "bfloat16") for rank in range(2))}
    (local,) = shard({"w": torch.randn(1000, 256)}, 1)
    packed = pack(layouts, [local.layout(0)])
    carried = Carrier(wanted_of(packed.layouts), packed.columns, packed.rows).carry(local.layout(0))
    for digest in layouts:
        assert len(make_plan([carried.layout], packed.layouts[digest]).writes(0)) == 1
    assert len(make_plan([local.layout(0)], next(iter(layouts.values()))).writes(0)) == 1000


def test_neighbours_of_an_engine_are_neighbours_in_the_arena() -> None:
    """Experts' slices of like columns stand side by side: a stacked parameter of all experts is one write."""
    experts = {f"experts.{i}": (64, 256) for i in range(8)}
    layouts = {}
    for rank in range(2):
        copies = tuple(
            Copy(name, rank * 128, (256, 1), "p.w2", i * 64 * 128, (128, 1), (64, 128))
            for i, name in enumerate(experts)
        )
        sources = tuple(SourceTensor(name, shape, "bfloat16") for name, shape in experts.items())
        layout = TargetLayout((Target("p.w2", (8, 64, 128), "bfloat16"),), sources, copies)
        layouts[layout.digest()] = layout
    (local,) = shard({name: torch.randn(*shape) for name, shape in experts.items()}, 1)
    packed = pack(layouts, [local.layout(0)])
    carried = Carrier(wanted_of(packed.layouts), packed.columns, packed.rows).carry(local.layout(0))
    for digest in layouts:
        assert len(make_plan([carried.layout], packed.layouts[digest]).writes(0)) == 1


def gate_and_up(n_experts: int, rows: int, columns: int, tp: int, rank: int, dtype: str) -> TargetLayout:
    """An engine rank that stacks its rows of gate and up of all experts: [E, 2 * rows / tp, columns]."""
    mine = rows // tp
    sources, copies = [], []
    targets = [Target("p.w13", (n_experts, 2 * mine, columns), dtype)]
    if dtype == "float8_e4m3fn":
        targets.append(Target("p.w13_scale_inv", (n_experts, 2 * mine // BLOCK, columns // BLOCK), "float32"))
    for number, name in enumerate(f"experts.{e}.{kind}" for e in range(n_experts) for kind in ("gate", "up")):
        sources.append(SourceTensor(name, (rows, columns), dtype))
        view = ("p.w13", number * mine * columns, (columns, 1), (mine, columns))
        copies.append(Copy(name, rank * mine * columns, (columns, 1), *view))
        if dtype == "float8_e4m3fn":
            grid, part = scale_grid((rows, columns)), mine // BLOCK
            sources.append(SourceTensor(name + SCALE_SUFFIX, grid, "float32"))
            view = ("p.w13_scale_inv", number * part * grid[1], (grid[1], 1), (part, grid[1]))
            copies.append(Copy(name + SCALE_SUFFIX, rank * part * grid[1], (grid[1], 1), *view))
    return TargetLayout(targets=tuple(targets), sources=tuple(sources), copies=tuple(copies))


@pytest.mark.parametrize(("dtype", "writes"), [("bfloat16", 1), ("float8_e4m3fn", 2)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_of_gate_and_up_of_all_experts_are_one_write(dtype: str, writes: int, ranks: int) -> None:
    """Parted where the engines part them, and like parts side by side; otherwise a write a half and expert."""
    layouts = {layout.digest(): layout for layout in (gate_and_up(4, 256, 256, 2, rank, dtype) for rank in range(2))}
    names = [tensor.name for tensor in next(iter(layouts.values())).sources if not tensor.name.endswith(SCALE_SUFFIX)]
    weights = {name: torch.randn(256, 256) for name in names}
    halves = [
        dict(list(weights.items())[: len(weights) // ranks]),
        dict(list(weights.items())[len(weights) // ranks :]),
    ]
    locals_ = [shard(part, 1)[0] for part in halves[:ranks]]
    locals_ = [LocalSources(shard(weights, 1)[0].tensors, local.pieces) for local in locals_]
    arenas = fill_all(locals_, layouts)
    for number, digest in enumerate(layouts):
        plan = make_plan(arenas[0].layouts, arenas[0].wants(digest))
        assert all(len(plan.writes(rank)) == writes for rank in range(ranks))
        memory = deliver(arenas, arenas[0].wants(digest))
        mine = slice(number * 128, number * 128 + 128)
        if dtype == "bfloat16":
            want = torch.cat([weight[mine].to(torch.bfloat16) for weight in weights.values()])
        else:
            made = {name: fp8.scales_of(fp8.block_amax(weight)) for name, weight in weights.items()}
            want = torch.cat([fp8.quantize(weights[n], scales)[mine].view(torch.uint8) for n, scales in made.items()])
            scales = torch.cat([scales[number : number + 1] for scales in made.values()])
            assert same(memory["p.w13_scale_inv"].view(-1, 2), scales)
        assert same(memory["p.w13"].view(-1, 256), want)


def test_fp8_rows_are_parted_between_blocks_only() -> None:
    """An engine that begins within a block gets what it wants; two slots of one rank never share a block."""
    shapes = {"w": (256, 128)}
    whole = row_parallel(shapes, 1, 0, "float8_e4m3fn")
    copies = tuple(
        Copy("w", 100 * 128, (128, 1), c.target, 0, (128, 1), (156, 128)) if c.source == "w" else c
        for c in whole.copies
    )
    targets = (Target("p.w", (156, 128), "float8_e4m3fn"), whole.targets[1])
    layout = TargetLayout(targets, whole.sources, copies)
    weights = {"w": torch.randn(256, 128)}
    arenas = fill_all(shard(weights, 1), layout)
    memory = deliver(arenas, layout)
    scales = fp8.scales_of(fp8.block_amax(weights["w"]))
    assert same(memory["p.w"].view(156, 128), fp8.quantize(weights["w"], scales)[100:])


@pytest.mark.parametrize("why", ["a rank holds part of a row", "slices end within a block", "scales are cut elsewhere"])
def test_what_does_not_fit_stays_whole(why: str) -> None:
    dtype = "bfloat16" if why == "a rank holds part of a row" else "float8_e4m3fn"
    layout = row_parallel({"w": (256, 256 if "scales" in why or dtype == "bfloat16" else 384)}, 2, 0, dtype)
    holding = Holding("w", 0, 100 if dtype == "bfloat16" else 256 * 256, 0)
    if "within" in why:
        holding = Holding("w", 0, 256 * 384, 0)
        copies = tuple(
            Copy("w_scale_inv", 0, (3, 1), c.target, 0, (1, 1), (2, 1)) if c.source == "w_scale_inv" else c
            for c in layout.copies
        )
        layout = TargetLayout(layout.targets, layout.sources, copies)
    if "scales" in why:
        whole = SourceTensor("w_scale_inv", (2, 2), "float32")
        copies = (layout.copies[0], Copy("w_scale_inv", 0, (1,), "p.w_scale_inv", 0, (1,), (4,)))
        targets = (layout.targets[0], Target("p.w_scale_inv", (2, 2), "float32"))
        layout = TargetLayout(targets, (layout.sources[0], whole), copies)
    shape = layout.sources[0].shape
    held = SourceLayout(0, (SourceTensor("w", shape, "bfloat16"),), (holding,))
    packed = pack({"d": layout}, [held])
    assert packed.columns == {}
    assert packed.layouts["d"] == layout


def test_an_engine_that_comes_later_fits_slices_that_end_where_its_own_do() -> None:
    shapes = {"w": (64, 512)}
    four = {layout.digest(): layout for layout in (row_parallel(shapes, 4, rank, "bfloat16") for rank in range(4))}
    two, three = row_parallel(shapes, 2, 1, "bfloat16"), row_parallel({"w": (64, 512)}, 3, 1, "bfloat16")
    weights = {"w": torch.randn(64, 512)}
    arenas = fill_all(shard(weights, 2), four)
    assert arenas[0].carries({two.digest(): two})
    assert arenas[1].carries({two.digest(): two})
    memory = deliver(arenas, arenas[0].wants(two.digest()))
    assert same(memory["p.w"].view(64, 256), weights["w"][:, 256:].to(torch.bfloat16))
    assert not arenas[0].carries({three.digest(): three})
    assert in_terms_of(pack(four, [shard(weights, 1)[0].layout(0)]).columns, three) is None
