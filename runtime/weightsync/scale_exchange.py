"""What trainer ranks agree on before they convert: the greatest magnitudes of FP8 blocks that straddle them. Imports torch only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from weightsync.errors import TransportError
from weightsync.waiting import Deadline, wait_until

Agree = Callable[[Tensor], Tensor]
"""The element-wise maximum of an int32 vector over all trainer ranks; called by all of them for the same lengths."""


def alone(amax: Tensor) -> Tensor:
    """The agreement of a trainer of one rank."""
    return amax


class ScaleExchange:
    """The exchange among the ranks of one trainer incarnation, over a gloo group that they make when one is first needed.

    A gloo group in which one exchange did not end carries no later one. So each rank says in every push which group it holds
    (`group`, told with its plan), and the ranks use it only if all hold the same one: else they meet anew under that push's name,
    and look meanwhile whether the push is over. A rank whose part of a push failed calls `forget`, which closes its connections:
    nobody who exchanges waits for it.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        """store: torch's, of all ranks; it is not used while there is one rank."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._held: Any = None
        self.group = ""
        """The push in which the ranks of the group that this one holds met; empty without one."""

    def within(self, push_id: str, deadline: Deadline, groups: Mapping[int, str], look: Callable[[], object]) -> Agree:
        """The agreement of one push, given what each rank said of its group.

        It raises TransportError or DeadlineExceeded once the deadline has passed or a rank is gone, and, until all ranks are there,
        what `look` raises because the push is over.
        """
        if self._world_size == 1:
            return alone
        if set(groups.values()) != {self.group}:
            self.forget()
        return lambda amax: self._agree(amax, push_id, deadline, look)

    def forget(self) -> None:
        """Close what this rank holds."""
        self._held, self.group = None, ""

    def _agree(self, amax: Tensor, push_id: str, deadline: Deadline, look: Callable[[], object]) -> Tensor:
        started = time.monotonic()
        try:
            if self._held is None:
                self._held = self._meet(push_id, deadline, look)
                self.group = push_id
            options = dist.AllreduceOptions()
            options.reduceOp, options.timeout = dist.ReduceOp(dist.ReduceOp.MAX), _left(deadline)
            self._held.allreduce([amax], options).wait()
        except RuntimeError as error:
            self.forget()
            raise TransportError(
                f"push {push_id}: trainer rank {self._rank} of {self._world_size} did not agree on FP8 scales with the others, "
                f"after {time.monotonic() - started:.1f} s: {error}"
            ) from error
        return amax

    def _meet(self, push_id: str, deadline: Deadline, look: Callable[[], object]) -> Any:
        """A new group, as soon as all ranks are there: nothing interrupts gloo's own wait for them."""
        store = PrefixStore(f"weightsync/scales/{push_id}", self._store)
        store.set(f"here/{self._rank}", "1")
        here = [f"here/{rank}" for rank in range(self._world_size)]

        def fetch() -> bool | None:
            look()
            return store.check(here) or None

        wait_until(fetch, deadline=deadline, what=f"push {push_id}: trainer ranks have not come to agree on FP8 scales")
        return dist.ProcessGroupGloo(store, self._rank, self._world_size, _left(deadline))


def _left(deadline: Deadline) -> timedelta:
    """For gloo, which wants more than nothing."""
    return timedelta(seconds=max(deadline.left_s, 0.001))
