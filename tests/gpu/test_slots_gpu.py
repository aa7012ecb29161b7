"""A rank's arena on the GPU has the bytes of one on the host: FP8, scales, casts, blocks that straddle ranks."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from tests.dataplane.refined_engine import Experts
from tests.dataplane.slot_makers import deliver, fill_all, fp8_engine, same, shard
from weightsync.errors import ConversionError


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
