"""The one adapter over NIXL: its handles become context-managed objects, its status strings an enum.

What the layers above must know (design section 8, measured): a posted transfer cannot be cancelled. Releasing its handle, or
dropping the agent, leaves it sending from a source that the next step rewrites. So `Transfer.release` refuses while the
transfer is in flight, and the only ways out are its end or the end of the process. Seen from the other side, a lost writer's
access to our memory ends over tcp when our own agent is destroyed (`Agent.close`); memory that a writer on the same host can
reach by shared memory stays open to it until that process dies.
"""

from __future__ import annotations

import enum
import functools
import importlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from weightsync.errors import TransportError
from weightsync.telemetry import Transports
from weightsync.threads import KeptThreads
from weightsync.transport.ucx import UcxLog

if TYPE_CHECKING:
    import torch

BACKEND = "UCX"
PACKAGES = ("nixl_cu12", "nixl_cu13")
SEND_POLL_S = 0.002
"""Between two calls that move a message on; each takes a microsecond when there is nothing to do."""


class TransferState(enum.Enum):
    """Where a posted transfer stands; DONE and FAILED are terminal."""

    IN_FLIGHT = "in flight"
    DONE = "done"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        return self is not TransferState.IN_FLIGHT


_STATES = {"DONE": TransferState.DONE, "SUCCESS": TransferState.DONE, "PROC": TransferState.IN_FLIGHT}


@dataclass(frozen=True, kw_only=True)
class Region:
    """A contiguous byte range of registered memory, in its owner's address space."""

    address: int
    length_bytes: int
    device_id: int = 0


class Agent:
    """A NIXL agent with the UCX backend. UCX reads UCX_TLS and friends from the environment when it is made.

    Names must be unique over the life of a session (pod UID and incarnation in it): a peer refuses a second agent of a name
    that it already knows, or worse, writes to the address of the first.
    """

    def __init__(self, name: str) -> None:
        nixl = _nixl()
        # No progress thread: NIXL's spins on a core for as long as the agent lives. Polling a transfer, or for notifications,
        # makes progress, and that is done only while a push is open.
        # STRICT: the receiver's worker thread polls notifications while RPCs register and describe memory.
        config = nixl.nixl_agent_config(
            backends=[BACKEND],
            enable_prog_thread=False,
            sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
            capture_telemetry=True,
        )
        self.name = name
        with ucx_log().asked_for():
            self._agent = nixl.nixl_agent(name, config)
        self._registrations: dict[int, object] = {}
        self._numbers = itertools.count()
        self._memory_types: set[str] = set()
        self._threads = KeptThreads("weightsync-send")
        if BACKEND not in self._agent.backends:
            raise TransportError(f"NIXL has no {BACKEND} backend; it offers {sorted(self._agent.plugin_list)}")

    def register(self, tensors: Sequence[torch.Tensor]) -> int:
        """Register the memory of contiguous tensors (any dtype, one device kind), one registration a tensor.

        Returns what `deregister` takes: their addresses may change meanwhile. Raises TransportError when the backend refuses, which
        on RDMA usually means that memlock is too low.
        """
        try:
            registration = self._agent.register_memory(list(tensors), backends=[BACKEND])
        except Exception as error:
            total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            raise TransportError(
                f"NIXL refused to register {len(tensors)} tensors, {total} bytes ({error}); check `ulimit -l` on RDMA"
            ) from error
        number = next(self._numbers)
        self._registrations[number] = registration
        self._memory_types.update("VRAM" if tensor.is_cuda else "DRAM" for tensor in tensors)
        return number

    def deregister(self, number: int) -> None:
        """Take back what `register` gave that number to; no transfer from or to its memory may be prepared."""
        self._agent.deregister_memory(self._registrations.pop(number))

    def metadata(self) -> bytes:
        """What a peer needs to write into the memory registered so far: keep it within the session."""
        return self._agent.get_agent_metadata()

    def connect(self, metadata: bytes) -> str:
        """Learn a peer and open its connection; returns its agent name."""
        try:
            peer = self._agent.add_remote_agent(metadata)
            name = peer.decode() if isinstance(peer, bytes) else peer
            self._agent.make_connection(name)
        except Exception as error:
            raise TransportError(f"cannot connect to peer agent: {error}") from error
        return name

    def disconnect(self, peer: str) -> None:
        """Forget a peer, so that its name can be learned again."""
        try:
            self._agent.remove_remote_agent(peer)
        except Exception as error:
            raise TransportError(f"cannot forget peer agent {peer}: {error}") from error

    def prepare(self, peer: str, local: Sequence[Region], remote: Sequence[Region]) -> Transfer:
        """One WRITE of local[i] to remote[i] for all i, reusable by posting it again.

        Raises TransportError if the lists differ in length, or a region lies outside registered memory.
        """
        if len(local) != len(remote) or not local:
            raise TransportError(f"{len(local)} local regions for {len(remote)} remote ones towards {peer}")
        memory = "VRAM" if "VRAM" in self._memory_types else "DRAM"
        indices = list(range(len(local)))
        try:
            source = self._agent.prep_xfer_dlist("", _triples(local), memory)
            target = self._agent.prep_xfer_dlist(peer, _triples(remote), memory)
            handle = self._agent.make_prepped_xfer("WRITE", source, indices, target, indices)
        except Exception as error:
            raise TransportError(f"cannot prepare {len(local)} writes to {peer}: {error}") from error
        return Transfer(self._agent, handle, (source, target), peer, sum(region.length_bytes for region in local))

    def notify(self, peer: str, payload: bytes) -> None:
        """Send a message; it may overtake transfers, so send it only when they are all terminal.

        One of megabytes leaves in pieces, and only while this process calls NIXL: see `sending_on`.
        """
        try:
            self._agent.send_notif(peer, payload)
        except Exception as error:
            raise TransportError(f"cannot notify {peer}: {error}") from error

    def notifications(self) -> list[tuple[str, bytes]]:
        """(peer agent name, payload) of each message that came since the last call."""
        received = self._agent.get_new_notifs()
        return [(peer, payload) for peer, payloads in received.items() for payload in payloads]

    @contextmanager
    def sending_on(self) -> Iterator[None]:
        """Within, messages that were sent go on to their end: a thread polls NIXL, which has none of its own here.

        Measured over tcp, 10 MB on loopback: without a call of the sender they never arrived.
        """
        done = threading.Event()

        def poll() -> None:
            while not done.wait(SEND_POLL_S):
                self.notifications()

        ended = self._threads.run(poll)
        try:
            yield
        finally:
            done.set()
            ended.wait()

    def close(self) -> None:
        """Deregister and destroy the agent: over tcp, peers can reach nothing of ours from here on."""
        for registration in self._registrations.values():
            self._agent.deregister_memory(registration)
        self._registrations.clear()
        self._threads.close()
        del self._agent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Transfer:
    """A prepared WRITE to one peer: post, poll until terminal, then post again or release."""

    def __init__(
        self, agent: object, handle: object, descriptors: tuple[object, object], peer: str, length: int
    ) -> None:
        self._agent = agent
        self._handle = handle
        self._descriptors = descriptors
        self.peer = peer
        self.length_bytes = length
        self.failure = ""
        """What NIXL said of a FAILED transfer."""
        self._state: TransferState | None = None

    def post(self) -> None:
        """Start the writes. Returns at once over a network; over shared memory when the bytes are copied."""
        if self._state is TransferState.IN_FLIGHT:
            raise TransportError(f"transfer of {self.length_bytes} bytes to {self.peer} is still in flight")
        self._state = self._read(self._agent.transfer)  # type: ignore[attr-defined]

    def poll(self) -> TransferState:
        """Where the posted transfer stands now."""
        if self._state is None:
            raise TransportError(f"transfer to {self.peer} was not posted")
        if not self._state.terminal:
            self._state = self._read(self._agent.check_xfer_state)  # type: ignore[attr-defined]
        return self._state

    def _read(self, call: Callable[[object], str]) -> TransferState:
        """NIXL tells a lost peer by an exception, other failures by a status; both are terminal."""
        try:
            status = call(self._handle)
        except Exception as error:
            self.failure = str(error)
            return TransferState.FAILED
        if status not in _STATES:
            self.failure = f"NIXL status {status}"
        return _STATES.get(status, TransferState.FAILED)

    def measured(self) -> tuple[float, float] | None:
        """When the last post began (time.monotonic()) and the seconds until it was seen DONE; None if NIXL cannot tell."""
        try:
            told = self._agent.get_xfer_telemetry(self._handle)  # type: ignore[attr-defined]
        except Exception:  # a push must not fail of its figures
            return None
        return told.startTime / 1e6, told.xferDuration / 1e6

    @property
    def in_flight(self) -> bool:
        return self._state is not None and not self.poll().terminal

    def release(self) -> None:
        """Give the handle back. Raises TransportError while bytes may still move: nothing can stop them."""
        if self.in_flight:
            raise TransportError(
                f"transfer of {self.length_bytes} bytes to {self.peer} is in flight and cannot be released"
            )
        self._agent.release_xfer_handle(self._handle)  # type: ignore[attr-defined]
        for descriptors in self._descriptors:
            self._agent.release_dlist_handle(descriptors)  # type: ignore[attr-defined]


@functools.cache
def _nixl() -> Any:
    """NIXL's Python API, which its wheels carry under one name for each major version of CUDA."""
    for name in PACKAGES:
        with suppress(ModuleNotFoundError):
            api = importlib.import_module(f"{name}._api")
            _log_as_libraries_do(logging.getLogger("nixl"))
            return api
    raise TransportError(f"NIXL is not installed: none of {', '.join(PACKAGES)} can be imported")


def _log_as_libraries_do(logger: logging.Logger) -> None:
    """NIXL prints its log to standard output, where a command's report goes: leave it to the application's handlers instead."""
    logger.handlers.clear()
    logger.propagate = True


def _triples(regions: Sequence[Region]) -> list[tuple[int, int, int]]:
    return [(region.address, region.length_bytes, region.device_id) for region in regions]


@functools.cache
def ucx_log() -> UcxLog:
    """What UCX says in this process."""
    return UcxLog.make()


def transports_in_use() -> Transports:
    """What moves this process's writes: in UCX's own words where it has told, else by exclusion, else unknown."""
    told = ucx_log().transports()
    if told:
        return Transports(names=told, proof="ucx")
    only = only_network_transport()
    return Transports(names=(only,), proof="exclusion") if only else Transports(names=(), proof="")


def only_network_transport(environ: dict[str, str] | os._Environ[str] = os.environ) -> str | None:
    """The one transport that UCX_TLS leaves between processes, or None when it leaves a choice.

    With a single candidate UCX either uses it or fails, so it is proved by exclusion; with more, only UCX knows.
    """
    candidates = {entry.strip() for entry in environ.get("UCX_TLS", "").split(",")} - {"self", "", "cuda_copy"}
    return candidates.pop() if len(candidates) == 1 and not any("^" in c or c == "all" for c in candidates) else None
