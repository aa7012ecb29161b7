"""A rank of a healthy replica as the writer of a repair: its live memory, read only, into the same rank of another replica.

The rank serves meanwhile, and a push may come. Whoever is about to change live memory says so first (`memory_changes`); a loan
gives its last word only when nobody has, between the first byte that it read and the last: so what it read was one version.
The digests in that word are those with which the version was committed, and the other rank holds what arrived against them.
What the loan registers is known to no peer: it is read, never written. A transfer cannot be cancelled: a loan that ends early
says so when its last handle is terminal, however long that takes; until then the other rank's memory is in quarantine.
Imports torch and the transport, never vLLM.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Protocol

import torch

from weightsync import device_memory
from weightsync.errors import FencedOut, LedgerUnavailable, PushAborted, TransportError, WeightSyncError
from weightsync.meter import TensorMeter
from weightsync.rendezvous.fencing import Fence, Notification
from weightsync.rendezvous.incarnation import replica_ranks
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor
from weightsync.rendezvous.records import PushRecord, WriterReport
from weightsync.sources import LOANS_AT_ONCE
from weightsync.telemetry import Stopwatch
from weightsync.transport import Agent, Region, Transfer, TransferState
from weightsync.transport.agent import transports_in_use
from weightsync.waiting import Deadline
from weightsync.wire import Decision

logger = logging.getLogger(__name__)

GROUP_BYTES = 1 << 26
"""A handle carries so much: what a loan that ends early still sends is bounded by GROUPS_IN_FLIGHT of them."""
GROUPS_IN_FLIGHT = 2
POLL_S = 0.0005
POLL_MAX_S = 0.05
LOOK_S = 0.5
"""A loan looks so often whether it is still wanted."""
CLOSE_S = 5.0


class Directory(Protocol):
    """Where a loan learns how the other rank is written to: `rendezvous.modelexpress.Rendezvous`."""

    def fetch(
        self, replica: str, incarnation: str, rank: int, *, deadline: float | None = None
    ) -> EngineDescriptor: ...


class Lender:
    """The loans of one engine rank.

    params: its live parameters by name, contiguous, in the format that a push brings; only read.
    covers: whether the engine has no others: what is lent must be all that makes a version.
    """

    def __init__(
        self,
        *,
        rank: int,
        params: Mapping[str, torch.Tensor],
        covers: bool,
        layout_digest: str,
        ledger: Ledger,
        rendezvous: Directory,
    ) -> None:
        self._rank = rank
        self._params = params
        self._layout_digest = layout_digest
        self._ledger = ledger
        self._rendezvous = rendezvous
        self._changes = 0
        self._closing = threading.Event()
        self._loans: list[threading.Thread] = []
        self.able = covers and device_memory.registrable(params.values())
        """Whether the parameters are a whole version, and a NIC can read them where they lie."""

    def memory_changes(self) -> None:
        """Live memory may be written from now on: loans under way must not vouch for what they read."""
        self._changes += 1

    def lend(self, record: PushRecord, digests: Mapping[str, int] | None, *, why_not: str) -> None:
        """Begin the loan that `record` asks for, or have the ledger told `why_not`; on a thread, since both take a while.

        digests: of each parameter as committed; None has them measured first.
        """
        self._loans = [loan for loan in self._loans if loan.is_alive()]
        if not self.able:
            why_not = why_not or "its memory is no whole version in load format, or lies in expandable segments"
        if len(self._loans) >= LOANS_AT_ONCE:
            why_not = why_not or f"it lends to {len(self._loans)} replicas already"
        before = self._changes
        loan = _Loan(
            record=record,
            agent_name=f"{record.source}/{self._rank}/{record.source_incarnation}/{record.push_id}",
            rank=self._rank,
            params=self._params,
            layout_digest=self._layout_digest,
            digests=digests,
            ledger=self._ledger,
            rendezvous=self._rendezvous,
            why_not=why_not,
            changed=lambda: self._changes != before or self._closing.is_set(),
            closing=self._closing,
        )
        thread = threading.Thread(target=loan.run, name=f"lend-{record.push_id}", daemon=True)
        self._loans.append(thread)
        thread.start()

    def close(self) -> None:
        """End all loans; waits a while for what is in flight."""
        self._closing.set()
        patience = Deadline(CLOSE_S)
        for loan in self._loans:
            loan.join(max(patience.left_s, 0.0))


class _Loan:
    """One repair, as the lending rank carries it out."""

    def __init__(
        self,
        *,
        record: PushRecord,
        agent_name: str,
        rank: int,
        params: Mapping[str, torch.Tensor],
        layout_digest: str,
        digests: Mapping[str, int] | None,
        ledger: Ledger,
        rendezvous: Directory,
        why_not: str,
        changed: Callable[[], bool],
        closing: threading.Event,
    ) -> None:
        self._record = record
        ((self._target, word),) = record.members.items()
        _, _, self._target_incarnation = replica_ranks(self._target, word)[rank]
        self._agent_name = agent_name
        self._rank = rank
        self._params = dict(sorted(params.items()))
        self._layout_digest = layout_digest
        self._digests = digests
        self._ledger = ledger
        self._rendezvous = rendezvous
        self._why_not = why_not
        self._changed = changed
        self._closing = closing
        self._next_look = Deadline(0.0)

    def run(self) -> None:
        """Lend, tell the ledger how it ended once no handle is in flight any more, and stay until the last word was heard."""
        with ExitStack() as stack:
            report = self._report(stack)
            self._tell(report)
            if report.ok:
                self._deliver()

    def _report(self, stack: ExitStack) -> WriterReport:
        """How the loan went; its agent lives on `stack`."""
        watch = Stopwatch()
        try:
            with torch.cuda.device_of(next(iter(self._params.values()))):  # UCX copies by the calling thread's device
                self._deadline = Deadline.at(self._ledger.deadline_to_monotonic(self._record.deadline_at))
                with watch.phase("wire"):
                    written = self._lend(stack)
            moved_by = transports_in_use()
            logger.info("repair %s: lent %d bytes to %s", self._record.push_id, written, self._target)
            return WriterReport(
                rank=self._rank,
                ok=True,
                bytes=written,
                spans=watch.told(self._ledger.clock_of),
                transports=moved_by.names,
                transport_proof=moved_by.proof,
            )
        except (
            Exception
        ) as error:  # `_lend` has drained: whatever it was, nothing is in flight, and the other rank must hear it
            logger.warning(
                "repair %s: not lent to %s: %s",
                self._record.push_id,
                self._target,
                error,
                exc_info=not isinstance(error, WeightSyncError),
            )
            return WriterReport(rank=self._rank, ok=False, reason=f"{self._record.source}: {error}")

    def _tell(self, report: WriterReport) -> None:
        """However long the ledger is away: where only our death would else end our access, this is the one proof of it."""
        while True:
            try:
                self._ledger.report_writer(self._record.push_id, report)
                return
            except LedgerUnavailable as error:
                logger.warning("repair %s: cannot tell how it ended: %s", self._record.push_id, error)
            if self._closing.wait(LOOK_S):
                return

    def _deliver(self) -> None:
        """Until the repair is decided: with the agent goes what of the last word has not been sent."""
        while not (self._deadline.passed or self._closing.is_set()):
            try:
                patient = self._ledger.until(time.monotonic())  # one try
                verdict = patient.await_decision(self._record.push_id, self._deadline.left_s)
                if verdict is None or verdict.decision is not Decision.OPEN:
                    return
            except LedgerUnavailable:
                self._closing.wait(LOOK_S)

    def _lend(self, stack: ExitStack) -> int:
        """The bytes that were written. Raises whatever ended it early; no handle is in flight afterwards.

        `stack` keeps the agent, which goes on to send the last word until the stack is closed.
        """
        if self._why_not:
            raise FencedOut(self._why_not)
        there = self._find()
        digests = TensorMeter(self._params).measure() if self._digests is None else self._digests
        agent = stack.enter_context(Agent(self._agent_name))
        agent.register(list(self._params.values()))
        peer = agent.connect(there.metadata)
        stack.callback(_forget, agent, peer)
        flying: deque[Transfer] = deque()
        with ExitStack() as drained:
            drained.callback(_drain, flying)
            for group in _groups(self._params, there.tensors):
                self._require_wanted()
                local, remote = zip(*group, strict=True)
                flying.append(agent.prepare(peer, local, remote))
                flying[-1].post()
                while len(flying) >= GROUPS_IN_FLIGHT:
                    self._wait_first(flying)
            while flying:
                self._wait_first(flying)
        if self._changed():
            raise FencedOut("a push changes what was read")
        agent.notify(peer, self._last_word(digests).encode())
        stack.enter_context(agent.sending_on())
        return sum(tensor.nbytes for tensor in self._params.values())

    def _find(self) -> EngineDescriptor:
        """How the other rank is written to. Raises TransportError unless its tensors are of the sizes of ours."""
        there = self._rendezvous.fetch(
            self._target, self._target_incarnation, self._rank, deadline=self._deadline.moment
        )
        here = {name: tensor.nbytes for name, tensor in self._params.items()}
        theirs = {name: tensor.length_bytes for name, tensor in there.tensors.items()}
        if here != theirs:
            other = sorted(name for name in here.keys() | theirs.keys() if here.get(name) != theirs.get(name))
            raise TransportError(f"{len(other)} tensors of {self._target} are of other sizes: {', '.join(other[:5])}")
        return there

    def _require_wanted(self) -> None:
        """Raise as soon as nothing that is sent from here on can be of use."""
        if self._changed():
            raise FencedOut("a push changes what is lent")
        if self._deadline.passed:
            raise PushAborted("its deadline has passed")
        if not self._next_look.passed:
            return
        self._next_look = Deadline(LOOK_S)
        with suppress(LedgerUnavailable):
            verdict = self._ledger.until(time.monotonic()).decision(self._record.push_id)  # one try
            if verdict is None or verdict.decision is not Decision.OPEN:
                raise PushAborted(verdict.reason if verdict else "the ledger lost it")

    def _wait_first(self, flying: deque[Transfer]) -> None:
        """Until the oldest handle is terminal, which is then released. Raises TransportError when it failed."""
        _await(flying[0], self._require_wanted)
        first = flying.popleft()
        first.release()
        if first.poll() is TransferState.FAILED:
            raise TransportError(f"a transfer of {first.length_bytes} bytes to {first.peer} failed: {first.failure}")

    def _last_word(self, digests: Mapping[str, int]) -> Notification:
        fence = Fence.of(self._record, self._layout_digest)
        return Notification(
            session=fence.session,
            push_id=fence.push_id,
            epoch=fence.epoch,
            version=fence.version,
            plan_digest=fence.plan_digest,
            writer_rank=self._rank,
            bytes_written=sum(tensor.nbytes for tensor in self._params.values()),
            partial_digests={index: digests[name] for index, name in enumerate(self._params)},
        )


def _drain(flying: deque[Transfer]) -> None:
    """Until every handle is terminal: nothing else may happen to it. One towards a frozen peer ends with that peer."""
    while flying:
        _await(flying[0], lambda: None)
        flying.popleft().release()


def _await(transfer: Transfer, meanwhile: Callable[[], None]) -> None:
    """Until the handle is terminal, or `meanwhile`, which is called between two looks at it, raises."""
    pause_s = POLL_S
    while transfer.in_flight:
        meanwhile()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, POLL_MAX_S)


def _forget(agent: Agent, peer: str) -> None:
    with suppress(TransportError):  # NIXL itself forgets a peer whose connection broke
        agent.disconnect(peer)


def _groups(
    params: Mapping[str, torch.Tensor], there: Mapping[str, RemoteTensor]
) -> Iterator[list[tuple[Region, Region]]]:
    """(here, there) of every byte, GROUP_BYTES or a little more at a time."""
    group: list[tuple[Region, Region]] = []
    carried = 0
    for name, tensor in params.items():
        remote, device_id = there[name], max(tensor.get_device(), 0)
        for offset in range(0, tensor.nbytes, GROUP_BYTES):
            length = min(GROUP_BYTES, tensor.nbytes - offset)
            group.append(
                (
                    Region(address=tensor.data_ptr() + offset, length_bytes=length, device_id=device_id),
                    Region(address=remote.address + offset, length_bytes=length, device_id=remote.device_id),
                )
            )
            carried += length
            if carried >= GROUP_BYTES:
                yield group
                group, carried = [], 0
    if group:
        yield group
