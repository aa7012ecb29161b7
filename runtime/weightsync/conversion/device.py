"""A group's conversion on its GPU: one launch for all FP8 blocks, one for all casts, one look at what went wrong.

Prepared once for the same memory and used each push. Imports torch and Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from weightsync.conversion.kernels import Fp8Group, Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
    """Elements that become bf16 or fp32. source and out: of one shape; the source any view, the output contiguous."""

    name: str
    source: Tensor
    out: Tensor
    through: torch.dtype


class DeviceConversion:
    """All slots of one group.

    blocks: (tensor's name, job) of each FP8 slot; casts: the others.
    """

    def __init__(self, blocks: Sequence[tuple[str, Job]], casts: Sequence[Cast], *, ue8m0: bool) -> None:
        self._casts = casts
        dtypes = sorted({job.source.dtype for _, job in blocks}, key=str)
        self._groups = [
            (
                Fp8Group([job for _, job in blocks if job.source.dtype == dtype], ue8m0=ue8m0),
                [name for name, job in blocks if job.source.dtype == dtype],
            )
            for dtype in dtypes
        ]

        self.names = [name for _, names in self._groups for name in names] + [cast.name for cast in casts]
        """Of the tensors that `flags` speak of."""

    def run(self) -> None:
        """Launch on the current stream; waits for nothing."""
        for group, _ in self._groups:
            group.faults.zero_()
            group.convert()
        self.flags = [group.faults for group, _ in self._groups]
        """[n] int32 each, together one a name; not 0 where the last run met an infinity or a NaN."""
        if self._casts:
            outs = [cast.out for cast in self._casts]
            torch._foreach_copy_(outs, [_rounded(cast) for cast in self._casts])  # pyright: ignore[reportPrivateImportUsage]
            norms = torch._foreach_norm(outs, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
            self.flags.append((~torch.isfinite(torch.stack([norm.float() for norm in norms]))).int())


def _rounded(cast: Cast) -> Tensor:
    """The source, rounded first where neither end has the checkpoint's dtype."""
    kept = cast.through in (cast.source.dtype, cast.out.dtype)
    return cast.source if kept else cast.source.to(cast.through)
