"""The cast kernel gives the bytes of the host's casts: run by Triton's interpreter on the host, compiled for a GPU without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = """
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

COMPILED = """
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


@pytest.mark.parametrize(("code", "said"), [(INTERPRETED, "equal"), (COMPILED, "compiled")])
def test_the_kernel(code: str, said: str, tmp_path: object) -> None:
    """In a process of its own: Triton reads at its import whether to interpret."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"TRITON_INTERPRET": "1"} if code is INTERPRETED else {}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == said, answer.stderr[-2000:]
