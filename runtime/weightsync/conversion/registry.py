"""The registry of conversions and the one function that publishers call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightsync.errors import ConversionError

Convert = Callable[[Tensor, Tensor], None]


def convert_into(out: Tensor, flat: Tensor, *, name: str, target_format: str = "bf16") -> None:
    """Write `flat` ([n], the trainer's dtype) into `out` ([n], dtype of `target_format`, same device).

    bf16 is copied bit by bit, fp32 rounded to nearest even as torch's own cast does. Raises ConversionError naming
    `name` for a pair that is not registered, for sizes that differ, and for an infinity or NaN in what would be sent.
    """
    convert = _REGISTRY.get((flat.dtype, target_format))
    if convert is None:
        known = ", ".join(sorted(f"{_short(dtype)} to {format_}" for dtype, format_ in _REGISTRY))
        raise ConversionError(f"{name}: no conversion from {_short(flat.dtype)} to {target_format}; there are {known}")
    if out.shape != flat.shape or out.dim() != 1 or out.dtype != _ELEMENTS[target_format]:
        raise ConversionError(
            f"{name}: cannot convert {list(flat.shape)} elements into {list(out.shape)} of {_short(out.dtype)}: "
            f"want flat tensors of one length, the output {_short(_ELEMENTS[target_format])}"
        )
    convert(out, flat)
    _check_finite(out, flat, name)


def _cast(out: Tensor, flat: Tensor) -> None:
    out.copy_(flat)


_REGISTRY: dict[tuple[torch.dtype, str], Convert] = {(torch.bfloat16, "bf16"): _cast, (torch.float32, "bf16"): _cast}
_ELEMENTS = {"bf16": torch.bfloat16}


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
