"""Kernels give the bytes of the host's conversions: run by Triton's interpreter on the host, compiled for a GPU without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CAST = """
import itertools, torch
from weightsync.conversion import convert_into
from weightsync.conversion.cast_kernels import Cast, CastGroup
from weightsync.errors import ConversionError

generator = torch.Generator().manual_seed(1)
base = torch.randn(40, 700, generator=generator) * torch.logspace(-30, 30, 700)
wide = torch.randn(20000, generator=generator)
wide[:4] = torch.tensor([0.0, -0.0, 1e-45, -1e-40])
dtypes = (torch.bfloat16, torch.float32)
for source, out in itertools.product(dtypes, dtypes):
    views = [base[:, 64:576], base[:, 3:77], base, wide, wide[1:9000], base[5], base[:0]]
    views = [view.to(source) if view.is_contiguous() else view for view in views]
    if source != torch.float32:
        views[:2] = [base.to(source)[:, 64:576], base.to(source)[:, 3:77]]
    outs = [torch.full(view.shape, 7.0, dtype=out) for view in views]
    casts = [Cast(name=str(i), source=v, out=o, through=torch.bfloat16) for i, (v, o) in enumerate(zip(views, outs))]
    group = CastGroup(casts)
    group.convert()
    for view, got in zip(views, outs):
        want = torch.empty(view.shape, dtype=out)
        convert_into(want, view, name="w")
        integers = torch.int16 if out == torch.bfloat16 else torch.int32
        assert torch.equal(got.view(integers), want.view(integers)), (source, out, view.shape)
    assert not group.faults.any()
    for bad in (float("inf"), float("nan")):
        views[3][17000] = bad
        group.convert()
        assert group.faults.tolist() == [0, 0, 0, 1, 0, 0, 0], group.faults
        views[3][17000] = 0.0
    group.convert()
    assert not group.faults.any()
print("equal")
"""

CAST_COMPILED = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weightsync.conversion.cast_kernels import _cast_tiles

signature = {"table": "*i64", "tiles": "*i32", "faults": "*i32"}
flags = ("ALIGNED", "ROUNDED", "SOURCE_FP32", "OUT_FP32")
for (rows, columns), *values in itertools.product([(1, 8192), (16, 512)], *[[False, True]] * 4):
    constants = {"ROWS": rows, "COLUMNS": columns, **dict(zip(flags, values))}
    whole = signature | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(_cast_tiles, whole, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}
    )
    if values[0]:
        assert "ld.global.v4" in compiled.asm["ptx"], constants
print("compiled")
"""

FP8 = """
import torch
from weightsync.conversion.jobs import Job
from weightsync.conversion.kernels import Fp8Group

generator = torch.Generator().manual_seed(1)
# The interpreter's cast to e4m3 forgets a carry: only quotients that e4m3 has exactly, scales that are powers of two.
base = torch.randint(-15, 16, (150, 300), generator=generator).float()
base[::32, ::32] = 448.0
# rows of the tensor, columns of the source that are written, what one scale is for
CASES = [
    (base, 0, None, (128, 128)),
    (base[:70, :129], 100, None, (128, 128)),
    (base[:100, :256], 28, range(96, 192), (32, 32)),
    (base[:40, :128], 24, range(64, 128), (8, 64)),
    (base[:33, :128], 224, range(32, 64), (32, 32)),
]
for ue8m0 in (False, True):
    for dtype in (torch.bfloat16, torch.float32):
        jobs, wanted = [], []
        for rows, row_start, columns, block in CASES:
            source = rows.to(dtype, copy=True)
            written = range(source.shape[1]) if columns is None else columns
            down = -(-(row_start + len(source)) // block[0]) - row_start // block[0]
            across = -(-written.stop // block[1]) - written.start // block[1]
            made = []
            for _ in range(2):
                out = torch.full((len(source), len(written)), 7, dtype=torch.uint8).view(torch.float8_e4m3fn)
                scales = torch.full((down, across), -1.0)
                grid = -(-(row_start % 128 + len(source)) // 128), -(-source.shape[1] // 128)
                others = 0x43E0 + 0x80 * torch.arange(-1, grid[0] * grid[1] - 1, dtype=torch.int32).view(grid)
                how = dict(row_start=row_start, columns=columns, block=block, amax=others)
                made.append(Job(source=source, out=out, scales=scales, **how))
            jobs.append(made[0])
            made[1].convert(ue8m0=ue8m0)
            wanted.append(made[1])
        group = Fp8Group(jobs, ue8m0=ue8m0)
        group.convert()
        for job, want in zip(jobs, wanted, strict=True):
            assert torch.equal(job.scales.view(torch.int32), want.scales.view(torch.int32)), (dtype, want.block)
            assert torch.equal(job.out.view(torch.uint8), want.out.view(torch.uint8)), (dtype, want.block)
        assert not group.faults.any()
        jobs[2].source[3, 5] = float("nan")
        group.convert()
        assert group.faults.tolist() == [0, 0, 1, 0, 0], group.faults
assert len({float(each) for job in jobs for each in job.scales.flatten()}) > 4
print("equal")
"""

FP8_COMPILED = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weightsync.conversion.kernels import _fp8_tiles, _fp8_words

signature = {"jobs": "*i64", "tiles": "*i32", "faults": "*i32"}
for kernel, spread, *values in itertools.product([_fp8_words, _fp8_tiles], [0, 1, 4], *[[False, True]] * 2):
    constants = {"SPREAD": spread, **dict(zip(("UE8M0", "SOURCE_FP32"), values))}
    whole = signature | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, whole, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}
    )
    if kernel is _fp8_words:
        assert "ld.global.v4" in compiled.asm["ptx"] and "st.global.v4" in compiled.asm["ptx"], constants
print("compiled")
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [(CAST, "equal"), (CAST_COMPILED, "compiled"), (FP8, "equal"), (FP8_COMPILED, "compiled")],
    ids=["cast interpreted", "cast compiled", "fp8 interpreted", "fp8 compiled"],
)
def test_the_kernel(code: str, said: str, tmp_path: object) -> None:
    """In a process of its own: Triton reads at its import whether to interpret."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"TRITON_INTERPRET": "1"} if said == "equal" else {}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == said, answer.stderr[-2000:]
