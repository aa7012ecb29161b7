"""A group's conversion on its GPU: one launch for all blocks or casts of a kind, one look at what went wrong.

Prepared once for the same memory and used each push. Imports torch and Triton.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from weightsync.conversion.cast_kernels import Cast, CastGroup
from weightsync.conversion.kernels import Fp8Group, Job
from weightsync.conversion.slices import Slice, SliceGroup

logger = logging.getLogger(__name__)

__all__ = ["Cast", "DeviceConversion", "Job"]


class DeviceConversion:
    """All slots of one group.

    blocks: (tensor's name, job) of each FP8 slot; slices: of those that end inside blocks, which torch converts one by one;
    casts: the others.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[str, Job]],
        slices: Sequence[tuple[str, Slice]],
        casts: Sequence[Cast],
        *,
        ue8m0: bool,
    ) -> None:
        self._groups: list[Fp8Group | SliceGroup | CastGroup] = []
        self.names: list[str] = []
        """Of the tensors that `flags` speak of."""
        for dtype in sorted({job.source.dtype for _, job in blocks}, key=str):
            mine = [(name, job) for name, job in blocks if job.source.dtype == dtype]
            self._groups.append(Fp8Group([job for _, job in mine], ue8m0=ue8m0))
            self.names += [name for name, _ in mine]
        if slices:
            self._groups.append(SliceGroup([each for _, each in slices], ue8m0=ue8m0))
            self.names += [name for name, _ in slices]
            logger.info(
                "%d FP8 slices end inside blocks of 128 by 128, first of %s: torch converts them, not the kernel",
                len(slices),
                slices[0][0],
            )
        for kind in sorted({_kind(cast) for cast in casts}):
            alike = [cast for cast in casts if _kind(cast) == kind]
            self._groups.append(CastGroup(alike))
            self.names += [cast.name for cast in alike]
        self.flags = [group.faults for group in self._groups]
        """[n] int32 each, together one a name; not 0 where the last run met an infinity or a NaN."""

    def run(self) -> None:
        """Launch on the current stream; waits for nothing."""
        for group in self._groups:
            group.convert()


def _kind(cast: Cast) -> str:
    return f"{cast.source.dtype} {cast.out.dtype} {cast.through}"
