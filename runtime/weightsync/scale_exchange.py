"""What trainer ranks agree on before they convert: the greatest magnitudes of FP8 blocks that straddle them. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from weightsync.errors import TransportError
from weightsync.waiting import Deadline

Agree = Callable[[Tensor], Tensor]
"""The element-wise maximum of an int32 vector over all trainer ranks; called by all of them for the same lengths."""


def alone(amax: Tensor) -> Tensor:
    """The agreement of a trainer of one rank."""
    return amax


class ScaleExchange:
    """The exchange among the ranks of one trainer incarnation, over a gloo group that they make when one is first needed.

    A gloo group in which one exchange did not end carries no later one. So whenever a push was not committed, each rank calls
    `forget`, and the next exchange meets anew under its push's name. Ranks that differ about how a push ended fail one exchange,
    by its deadline, and agree again after it.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        """store: torch's, of all ranks; it is not used while there is one rank."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._group: Any = None

    def within(self, push_id: str, deadline: Deadline) -> Agree:
        """The agreement of one push. It raises TransportError once the deadline has passed or a rank is gone."""
        return alone if self._world_size == 1 else lambda amax: self._agree(amax, push_id, deadline)

    def forget(self) -> None:
        """After a push that was not committed."""
        self._group = None

    def _agree(self, amax: Tensor, push_id: str, deadline: Deadline) -> Tensor:
        timeout_s = max(deadline.left_s, 0.001)
        try:
            if self._group is None:
                self._group = self._meet(push_id, timedelta(seconds=timeout_s))
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
            options.timeout = timedelta(seconds=max(deadline.left_s, 0.001))
            self._group.allreduce([amax], options).wait()
        except RuntimeError as error:
            self.forget()
            raise TransportError(
                f"trainer rank {self._rank} of {self._world_size}: the ranks did not agree on FP8 scales within the "
                f"{timeout_s:.1f} s that push {push_id} had left: {error}"
            ) from error
        return amax

    def _meet(self, push_id: str, timeout: timedelta) -> Any:
        store = PrefixStore(f"weightsync/scales/{push_id}", self._store)
        return dist.ProcessGroupGloo(store, self._rank, self._world_size, timeout)
