"""Casts of elements, with the checkpoint's dtype in between."""

from __future__ import annotations

import torch
from torch import Tensor

from weightsync.errors import ConversionError

CASTS = frozenset({torch.bfloat16, torch.float32})
"""Dtypes that elements are cast between; FP8 is made block by block (`conversion.fp8`)."""


def convert_into(out: Tensor, flat: Tensor, *, name: str, through: torch.dtype = torch.bfloat16) -> None:
    """Write `flat` ([n], bf16 or fp32) into `out` ([n], bf16 or fp32, same device), rounded to `through` on the way.

    `through` is the checkpoint's dtype: an engine gets what it would have loaded. bf16 is copied bit by bit, fp32 rounded to
    nearest even as torch's own cast does. Raises ConversionError naming `name` for other dtypes, for sizes that differ, and for
    an infinity or NaN in what would be sent.
    """
    if not {flat.dtype, out.dtype, through} <= CASTS:
        known = ", ".join(sorted(map(_short, CASTS)))
        raise ConversionError(
            f"{name}: no conversion from {_short(flat.dtype)} to {_short(out.dtype)}; there are casts between {known}"
        )
    if out.shape != flat.shape or out.dim() != 1:
        raise ConversionError(
            f"{name}: cannot convert {list(flat.shape)} elements into {list(out.shape)}: want flat tensors of one length"
        )
    out.copy_(flat if through in (flat.dtype, out.dtype) else flat.to(through))
    _check_finite(out, flat, name)


def _check_finite(out: Tensor, flat: Tensor, name: str) -> None:
    """Looks at what would be sent: a finite fp32 beyond bf16's range has become an infinity there."""
    if out.numel() == 0 or all(torch.isfinite(bound) for bound in torch.aminmax(out)):
        return
    bad = torch.nonzero(~torch.isfinite(out)).flatten()
    raise ConversionError(
        f"{name}: {len(bad)} of {out.numel()} elements are not finite, first element {int(bad[0])} "
        f"({flat[bad[0]].item()} became {out[bad[0]].item()}): the optimizer step diverged; nothing was pushed"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
