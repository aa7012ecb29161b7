"""Casts of elements, with the checkpoint's dtype in between."""

from __future__ import annotations

import torch
from torch import Tensor

from weightsync.errors import ConversionError

CASTS = frozenset({torch.bfloat16, torch.float32})
"""Dtypes that elements are cast between; FP8 is made block by block (`conversion.fp8`)."""


def convert_into(out: Tensor, values: Tensor, *, name: str, through: torch.dtype = torch.bfloat16) -> None:
    """Write `values` (bf16 or fp32) into `out` (same shape and device, bf16 or fp32), rounded to `through` on the way.

    `through` is the checkpoint's dtype: an engine gets what it would have loaded. bf16 is copied bit by bit, fp32 rounded to
    nearest even as torch's own cast does. Raises ConversionError naming `name` for other dtypes, for sizes that differ, and for
    an infinity or NaN in what would be sent.
    """
    if not {values.dtype, out.dtype, through} <= CASTS:
        known = ", ".join(sorted(map(_short, CASTS)))
        raise ConversionError(
            f"{name}: no conversion from {_short(values.dtype)} to {_short(out.dtype)}; there are casts between {known}"
        )
    if out.shape != values.shape:
        raise ConversionError(f"{name}: cannot convert {list(values.shape)} elements into {list(out.shape)}")
    out.copy_(values if through in (values.dtype, out.dtype) else values.to(through))
    require_finite(out, values, name=name)


def require_finite(out: Tensor, values: Tensor | None = None, *, name: str) -> None:
    """Raise ConversionError naming `name` and the first infinity or NaN in `out`, which would be sent.

    values: what it was made from, where it was: a finite fp32 beyond bf16's range has become an infinity there.
    """
    values = out if values is None else values
    if out.numel() == 0 or all(torch.isfinite(bound) for bound in torch.aminmax(out)):
        return
    sent, given = out.reshape(-1), values.reshape(-1)
    bad = torch.nonzero(~torch.isfinite(sent)).flatten()
    raise ConversionError(
        f"{name}: {len(bad)} of {out.numel()} elements are not finite, first element {int(bad[0])} "
        f"({given[bad[0]].item()} became {sent[bad[0]].item()}): the optimizer step diverged; nothing was pushed"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
