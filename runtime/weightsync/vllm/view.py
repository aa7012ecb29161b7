"""What a replica last knew of its ranks and of the ledger, and whether it may serve by that. Pure; no I/O."""

from __future__ import annotations

import dataclasses

from weightsync.rank_state import Description
from weightsync.wire import ReplicaState


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What the replica last knew of its workers and of the ledger."""

    ranks: tuple[Description, ...] = ()
    """By rank; empty until the workers have offered their memory."""
    committed: int | None = None
    """The session's committed version; None until the ledger was read once."""
    fault: str = ""
    """Why the replica could not start, so far."""

    @property
    def state(self) -> ReplicaState:
        """The worst state of any rank: a replica commits, and is dirty, as a whole; ranks of two versions are dirty together."""
        states = {ReplicaState(rank.state) for rank in self.ranks}
        if len({(rank.epoch, rank.version) for rank in self.ranks}) > 1:
            return ReplicaState.DIRTY
        for state in (ReplicaState.DIRTY, ReplicaState.OPEN, ReplicaState.VERIFIED):
            if state in states:
                return state
        return ReplicaState.CLEAN

    @property
    def torn(self) -> bool:
        """Whether the engine must not answer from what it holds, whatever push is under way."""
        return self.state is ReplicaState.DIRTY or any(rank.torn for rank in self.ranks)

    @property
    def version(self) -> int:
        return min((rank.version for rank in self.ranks), default=0)

    @property
    def epoch(self) -> int:
        return min((rank.epoch for rank in self.ranks), default=0)

    @property
    def digest(self) -> str:
        return "+".join(rank.digest for rank in self.ranks)

    @property
    def direct_bytes(self) -> int:
        """Payload of a push that all ranks take where the engine computes with it."""
        return sum(rank.direct_bytes for rank in self.ranks)

    @property
    def replayed_bytes(self) -> int:
        """Payload of a push that all ranks take in load format and replay."""
        return sum(rank.replayed_bytes for rank in self.ranks)

    @property
    def largest_rank_bytes(self) -> int:
        """Payload of a push that one rank takes, the one that takes the most."""
        return max((rank.direct_bytes + rank.replayed_bytes for rank in self.ranks), default=0)

    def refusal(self, max_skew: int) -> str:
        """Why the replica must not serve; empty when it may. A planned pause does not count: requests wait in the engine."""
        if not self.ranks:
            return self.fault or "starting: the engine's memory is not offered yet"
        if self.committed is None:
            return self.fault or "starting: the ledger was not read yet"
        if self.torn:
            return "; ".join(rank.reason for rank in self.ranks if rank.reason) or "weights are torn"
        about_to_switch = (
            self.state is ReplicaState.VERIFIED
        )  # paused for the committed version: requests wait in the engine
        if self.committed - self.version > max_skew and not about_to_switch:
            return f"holds version {self.version}, version {self.committed} is committed"
        return ""

    @property
    def late(self) -> bool:
        """Whether it is torn, or behind what the session has committed, with no push open on it."""
        behind = self.committed is not None and self.version < self.committed
        return bool(self.ranks) and (self.state is ReplicaState.DIRTY or (self.state is ReplicaState.CLEAN and behind))

    @property
    def lends(self) -> bool:
        """Whether the memory of all ranks can be lent."""
        return bool(self.ranks) and all(rank.lends for rank in self.ranks)
