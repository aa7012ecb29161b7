"""A group's conversion on its GPU: one launch for all blocks or casts of a kind, one look at what went wrong.

Prepared once for the same memory and used each push. Imports torch and Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

from weightsync.conversion.cast_kernels import Cast, CastGroup
from weightsync.conversion.jobs import Job
from weightsync.conversion.kernels import Fp8Group

__all__ = ["Cast", "DeviceConversion"]


class DeviceConversion:
    """All slots of one group.

    blocks: (tensor's name, job) of each FP8 slot; casts: the others.
    """

    def __init__(self, blocks: Sequence[tuple[str, Job]], casts: Sequence[Cast], *, ue8m0: bool) -> None:
        self._groups: list[Fp8Group | CastGroup] = []
        self.names: list[str] = []
        """Of the tensors that `flags` speak of."""
        # Those that write whole blocks apart: one slice among them would take the plain writes from all.
        for kind in sorted({_kind_of_job(job) for _, job in blocks}):
            mine = [(name, job) for name, job in blocks if _kind_of_job(job) == kind]
            self._groups.append(Fp8Group([job for _, job in mine], ue8m0=ue8m0))
            self.names += [name for name, _ in mine]
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


def _kind_of_job(job: Job) -> tuple[str, bool]:
    return str(job.source.dtype), job.cut


def _kind(cast: Cast) -> str:
    return f"{cast.source.dtype} {cast.out.dtype} {cast.through}"
