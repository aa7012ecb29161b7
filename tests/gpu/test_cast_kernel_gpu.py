"""The cast kernel, compiled and run on the device, gives the bytes of the host's casts and names what is not finite."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from weightsync.conversion import convert_into
from weightsync.conversion.cast_kernels import Cast, CastGroup

DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_any_view_has_the_bytes_of_the_host(source: torch.dtype, out: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(40, 700, generator=generator) * torch.logspace(-30, 30, 700)).to(source)
    wide = torch.randn(2_000_000, generator=generator).to(source)
    wide[:4] = torch.tensor([0.0, -0.0, 1e-45, -1e-40])
    device, spread = base.cuda(), wide.cuda()
    cut = [
        lambda b, w: b[:, 64:576],
        lambda b, w: b[:, 3:77],
        lambda b, w: b,
        lambda b, w: w,
        lambda b, w: w[1:9000],
        lambda b, w: b[5],
        lambda b, w: b[:0],
    ]
    casts = [
        Cast(name=str(n), source=v, out=torch.full(v.shape, 7.0, dtype=out, device="cuda"), through=torch.bfloat16)
        for n, v in enumerate(view(device, spread) for view in cut)
    ]
    group = CastGroup(casts)
    group.convert()
    integers = torch.int16 if out == torch.bfloat16 else torch.int32
    for view, cast in zip(cut, casts, strict=True):
        want = torch.empty(cast.source.shape, dtype=out)
        convert_into(want, view(base, wide), name="w")
        assert torch.equal(cast.out.cpu().view(integers), want.view(integers)), cast.name
    assert not group.faults.any()
    for bad in (float("inf"), float("nan")):
        spread[1_700_000] = bad
        group.convert()
        assert group.faults.tolist() == [0, 0, 0, 1, 0, 0, 0]
    spread[1_700_000] = 0.0
    group.convert()
    assert not group.faults.any()
