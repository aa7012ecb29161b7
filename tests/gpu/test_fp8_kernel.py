"""The Triton kernel gives the bytes of the torch reference, for every bf16 value under every amax and for odd shapes."""

from __future__ import annotations

import pytest
import torch

from weightsync.conversion import fp8

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from weightsync.conversion.jobs import Job
from weightsync.conversion.kernels import Fp8Group

ODD = [(1, 1), (127, 129), (129, 8), (130, 2047)]
SHAPES = [(128, 128), (1, 16), (127, 144), (256, 640), (130, 2048), (300, 96), (1536, 2048), (2048, 768)]


def reference(rows: torch.Tensor, ue8m0: bool, row_start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    scales = fp8.scales_of(fp8.block_amax(rows, row_start), ue8m0=ue8m0)
    return fp8.quantize(rows, scales, row_start), scales


def empty_like_blocks(rows: torch.Tensor, row_start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    grid = (fp8.blocks_of(rows.shape[0], row_start), fp8.blocks_of(rows.shape[1]))
    out = torch.full(rows.shape, 7, dtype=torch.uint8, device=rows.device).view(torch.float8_e4m3fn)
    return out, torch.full(grid, -1.0, device=rows.device)


def values(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Any finite bf16 pattern, or fp32 ones that round to one; block by block of other magnitude; some blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-100, 100, (-(-rows // 128), -(-columns // 128)), generator=generator)
    exponent[torch.rand(exponent.shape, generator=generator) < 0.1] = -200
    scale = torch.ldexp(torch.ones(()), exponent).repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    width = {1: torch.uint8, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(width), b.view(width))


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES + ODD], ids=["vectors", "odd"])
def test_a_group_of_many_shapes_equals_the_reference_on_the_cpu(
    ue8m0: bool, dtype: torch.dtype, shapes: list[tuple[int, int]]
) -> None:
    hosts = [values(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    jobs = []
    for rows in hosts:
        source = rows.cuda()
        out, scales = empty_like_blocks(source)
        jobs.append(Job(source=source, out=out, scales=scales))
    group = Fp8Group(jobs, ue8m0=ue8m0)
    group.convert()
    assert not group.faults.any()
    for rows, job in zip(hosts, jobs, strict=True):
        out, scales = reference(rows, ue8m0)
        assert same(job.scales.cpu(), scales), rows.shape
        assert same(job.out.cpu(), out), rows.shape


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("odd", [False, True], ids=["vectors", "odd"])
def test_slices_that_end_inside_blocks_equal_the_reference_on_the_cpu(
    ue8m0: bool, dtype: torch.dtype, odd: bool
) -> None:
    """(shape of the source, its first row, columns that are written, what one scale is for)"""
    cuts = [
        ((100, 256), 28, range(96, 192), (32, 32)),
        ((96, 2048), 672, range(2048), (32, 128)),
        ((2048, 256), 0, range(32, 128), (128, 32)),
        ((130, 384), 5, range(64, 320), (64, 64)),
        *([((40, 128), 24, range(72, 96), (8, 8))] if odd else []),
    ]
    jobs, wanted = [], []
    for i, (shape, row_start, columns, block) in enumerate(cuts):
        host = values(*shape, seed=i, dtype=dtype)
        down = -(-(row_start + shape[0]) // block[0]) - row_start // block[0]
        across = -(-columns.stop // block[1]) - columns.start // block[1]
        for rows, into in ((host.cuda(), jobs), (host, wanted)):
            out = torch.full((shape[0], len(columns)), 7, dtype=torch.uint8, device=rows.device)
            scales = torch.full((down, across), -1.0, device=rows.device)
            how = dict(row_start=row_start, columns=columns, block=block)
            into.append(Job(source=rows, out=out.view(torch.float8_e4m3fn), scales=scales, **how))
        wanted[-1].convert(ue8m0=ue8m0)
    group = Fp8Group(jobs, ue8m0=ue8m0)
    group.convert()
    assert not group.faults.any()
    for job, want in zip(jobs, wanted, strict=True):
        assert same(job.scales.cpu(), want.scales), want.block
        assert same(job.out.cpu(), want.out), want.block


@pytest.mark.parametrize("ue8m0", [False, True])
def test_every_bf16_value_under_every_amax_has_the_quotient_of_ieee_division(ue8m0: bool) -> None:
    """All finite patterns beside each amax, 127 or 128 to a block; the reference divides on the CPU for every 64th amax."""
    finite = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for amax_bits in [*range(1, 0x7F80, 61), 0x7F7F]:
        amax = torch.tensor([amax_bits], dtype=torch.int16).view(torch.bfloat16)
        small = finite[: amax_bits + 1]
        padded = torch.nn.functional.pad(small, (0, -len(small) % (127 * 128)))  # 128 columns a block, so vectors
        rows = torch.cat([padded.view(127, -1), amax.expand(1, padded.numel() // 127)])
        source = rows.cuda()
        out, scales = empty_like_blocks(source)
        Fp8Group([Job(source=source, out=out, scales=scales)], ue8m0=ue8m0).convert()
        want, want_scales = reference(rows, ue8m0)
        assert same(scales.cpu(), want_scales), amax_bits
        assert same(out.cpu(), want), amax_bits


def test_the_torch_reference_gives_the_same_bytes_on_both_devices() -> None:
    for i, shape in enumerate(SHAPES):
        rows = values(*shape, seed=i, dtype=torch.bfloat16)
        for ue8m0 in (False, True):
            host, device = reference(rows, ue8m0), reference(rows.cuda(), ue8m0)
            assert same(host[0], device[0].cpu()) and same(host[1], device[1].cpu()), shape


@pytest.mark.parametrize("cut", [1, 60, 128, 200, 383])
def test_two_ranks_that_share_a_block_agree_by_the_greater_amax(cut: int) -> None:
    rows = values(400, 300, seed=5, dtype=torch.bfloat16)
    whole, whole_scales = reference(rows, False)
    parts = [(rows[:cut].cuda(), 0), (rows[cut:].cuda(), cut)]
    grid = torch.zeros(whole_scales.shape, dtype=torch.int32)
    for part, start in parts:
        first = start // 128
        amax = fp8.block_amax(part, start).cpu()
        grid[first : first + len(amax)] = torch.maximum(grid[first : first + len(amax)], amax)
    for part, start in parts:
        out, scales = empty_like_blocks(part, start)
        amax = grid[start // 128 : start // 128 + len(scales)].contiguous().cuda()
        Fp8Group([Job(source=part, out=out, scales=scales, row_start=start, amax=amax)]).convert()
        assert same(out.cpu(), whole[start : start + len(part)])
        assert same(scales.cpu(), whole_scales[start // 128 : start // 128 + len(scales)])


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_the_job_with_an_infinity_or_nan_is_named(bad: float) -> None:
    jobs = []
    for i in range(3):
        source = values(200, 200, seed=i, dtype=torch.bfloat16).cuda()
        out, scales = empty_like_blocks(source)
        jobs.append(Job(source=source, out=out, scales=scales))
    jobs[1].source[150, 199] = bad
    group = Fp8Group(jobs)
    group.convert()
    assert group.faults.tolist() == [0, 1, 0]


def test_column_slices_are_packed_in_the_same_pass() -> None:
    """Two TP ranks want halves of each row: each gets them as one contiguous range."""
    rows = values(256, 512, seed=1, dtype=torch.bfloat16)
    source = rows.cuda()
    whole, whole_scales = reference(rows, False)
    jobs = []
    for part in source.split(256, dim=1):
        out, scales = torch.empty(256, 256, dtype=torch.uint8, device="cuda"), torch.empty(2, 2, device="cuda")
        jobs.append(Job(source=part, out=out.view(torch.float8_e4m3fn), scales=scales))
    Fp8Group(jobs).convert()
    for i, job in enumerate(jobs):
        assert same(job.out.cpu(), whole[:, i * 256 : (i + 1) * 256].contiguous())
        assert same(job.scales.cpu(), whole_scales[:, i * 2 : (i + 1) * 2].contiguous())
