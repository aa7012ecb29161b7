"""The adapter to ModelExpress: engines publish how their memory is reached, trainers fetch it.

The server is given a sealed box a rank (`sealing`) and the rank's name. Nothing is ever looked up by listing: ModelExpress
answers an empty list with OK when its Redis is gone (failure mode 66). Who takes part comes from the ledger, and each source is
fetched by its exact name. Imports grpc and modelexpress, and so torch.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

import grpc
from modelexpress import p2p_pb2 as _generated
from modelexpress.auth import with_auth
from modelexpress.metadata.source_id import compute_mx_source_id
from modelexpress.p2p_pb2_grpc import P2pServiceStub

from weightsync.config import Contract
from weightsync.errors import RendezvousUnavailable
from weightsync.rendezvous.heartbeat import Heartbeat
from weightsync.rendezvous.retry import retry_until
from weightsync.rendezvous.sealing import Seal

CALL_TIMEOUT_S = 5.0
RETRY_PAUSE_S = 0.2
HEARTBEAT_INTERVAL_S = 10.0
"""ModelExpress calls a source stale after 90 s; this often, because it is also how soon one that it forgot is back."""

SEALED = "weightsync.sealed.1"
"""Name of the one descriptor of a source, whose dtype holds the sealed box in base64; the number is the box's form.
Topology would hold it too, but is in every listing and rewritten by each heartbeat: for a layout of 300 KB, 24 ms a beat instead
of 1, and 400 KB an entry listed. NIXL's metadata has a field, which the server keeps as a list of numbers, 3.6 bytes a byte."""

_MESSAGE_LIMIT_BYTES = 100 * 1024 * 1024
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", _MESSAGE_LIMIT_BYTES),
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT_BYTES),
    # gRPC's own back-off grows to two minutes, and its connections are shared with others in the process.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)
_PASSING_CODES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
)

p2p_pb2: Any = _generated
"""Its names are made at import, where no type checker sees them."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteTensor:
    """A tensor in an engine's registered memory."""

    name: str
    address: int
    length_bytes: int
    device_id: int
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineDescriptor:
    """How one rank of an engine replica is written to, as its worker published it."""

    replica: str
    incarnation: str
    rank: int
    agent_name: str
    """Name of the worker's NIXL agent; carries the incarnation, so that a restarted peer is another one."""
    metadata: bytes
    """The NIXL agent's metadata."""
    tensors: dict[str, RemoteTensor]
    layout: bytes
    """What the rank wants, as `weightsync.layout` wrote it."""

    @property
    def worker_id(self) -> str:
        return f"{self.replica}/{self.incarnation}/{self.rank}"

    def to_fields(self) -> dict[str, Any]:
        """As JSON can hold it."""
        parts = {
            name: base64.b64encode(part).decode()
            for name, part in (("metadata", self.metadata), ("layout", self.layout))
        }
        # Not dataclasses.asdict, which copies deep: 2 s for 20,000 tensors.
        return {**vars(self), **parts, "tensors": {name: vars(tensor) for name, tensor in self.tensors.items()}}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """What `to_fields` made. Raises ValueError, KeyError or TypeError for anything else."""
        parts = {name: base64.b64decode(fields[name], validate=True) for name in ("metadata", "layout")}
        tensors = {name: RemoteTensor(**tensor) for name, tensor in fields["tensors"].items()}
        return cls(**{**fields, **parts, "tensors": tensors})


class _Passing(Exception):
    """A fault that may be gone at the next try."""


class Rendezvous:
    """A thread-safe client of one session's sources on a ModelExpress server; a context manager.

    secret: what all members of the session have and nobody else, which seals what they publish.
    Every call is tried again until `retry_s` ran out, or until the deadline that it is given (a time.monotonic()), and
    then raises RendezvousUnavailable.
    """

    def __init__(self, *, address: str, session: str, model: str, secret: str, retry_s: float = 15.0) -> None:
        self.address = address
        self._seal = Seal(secret=secret, session=session)
        self._retry_s = retry_s
        self._identity = p2p_pb2.SourceIdentity(model_name=model, extra_parameters={"weightsync.session": session})
        self._source_id = compute_mx_source_id(self._identity)
        self._lock = threading.Lock()
        self._channel = self._open_channel()

    @classmethod
    def from_contract(cls, contract: Contract, *, retry_s: float = 15.0) -> Self:
        """A client for the contract's server and session; nothing is sent yet. Raises ConfigError without the token file."""
        return cls(
            address=contract.model_express.address,
            session=contract.session,
            model=contract.model.path,
            secret=contract.endpoint_token(),
            retry_s=retry_s,
        )

    def publish(self, source: EngineDescriptor, *, deadline: float | None = None) -> None:
        """Offer a rank's memory under its exact name, replacing what was there. `deadline` is a time.monotonic()."""
        request = p2p_pb2.PublishMetadataRequest(
            identity=self._identity, worker=_worker(source, self._seal), worker_id=source.worker_id
        )

        def attempt(timeout_s: float) -> None:
            answer = self._send("PublishMetadata", request, timeout_s)
            if not answer.success:
                raise _Passing(answer.message)
            if answer.mx_source_id != self._source_id:
                raise RendezvousUnavailable(
                    f"ModelExpress at {self.address} calls this session {answer.mx_source_id}, its client"
                    f" {self._source_id}: server and `modelexpress` package must be of one version"
                )
            self._report_ready(source, timeout_s)

        self._retry(f"publish {source.worker_id}", attempt, deadline)

    def renew(self, source: EngineDescriptor, *, deadline: float | None = None) -> None:
        """Say that a source lives; publishes it again when the server has forgotten it."""

        def attempt(timeout_s: float) -> bool:
            return self._report_ready(source, timeout_s)

        if not self._retry(f"renew {source.worker_id}", attempt, deadline):
            self.publish(source, deadline=deadline)

    def fetch(self, replica: str, incarnation: str, rank: int, *, deadline: float | None = None) -> EngineDescriptor:
        """How to write into one rank of a replica that the ledger lists. Waits for it until the deadline.

        Raises RendezvousUnavailable when the server does not answer, has lost its Redis, or does not know the rank, and when what
        it holds was not sealed by that rank.
        """
        worker_id = f"{replica}/{incarnation}/{rank}"
        request = p2p_pb2.GetMetadataRequest(mx_source_id=self._source_id, worker_id=worker_id)

        def attempt(timeout_s: float) -> EngineDescriptor:
            answer = self._send("GetMetadata", request, timeout_s)
            if not answer.found:
                # An unknown source is answered under the name that was asked for, a fault of its Redis under none.
                raise _Passing("it does not know the source" if answer.mx_source_id else "its Redis does not answer")
            return _opened(replica, incarnation, rank, answer.worker, self._seal)

        return self._retry(f"fetch {worker_id}", attempt, deadline)

    def close(self) -> None:
        """Close the connection; sources stay until the server calls them stale."""
        with self._lock:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _report_ready(self, source: EngineDescriptor, timeout_s: float) -> bool:
        """One UpdateStatus, which stamps the source with the server's clock. False when the server does not know it."""
        request = p2p_pb2.UpdateStatusRequest(
            mx_source_id=self._source_id,
            worker_id=source.worker_id,
            worker_rank=source.rank,
            status=p2p_pb2.SOURCE_STATUS_READY,
        )
        return self._send("UpdateStatus", request, timeout_s).success

    def _retry(self, what: str, attempt: Callable[[float], T], deadline: float | None) -> T:
        started = time.monotonic()
        ends = started + self._retry_s if deadline is None else deadline

        def bounded() -> T:
            return attempt(max(0.1, min(CALL_TIMEOUT_S, ends - time.monotonic())))

        try:
            return retry_until(ends, bounded, passing=(_Passing,), pause_s=RETRY_PAUSE_S)
        except _Passing as error:
            tried_s = time.monotonic() - started
            raise RendezvousUnavailable(
                f"ModelExpress at {self.address}: {what} failed for {tried_s:.1f} s ({error}); is it up, and its Redis,"
                " and does the engine run?"
            ) from error

    def _send(self, method: str, request: Any, timeout_s: float) -> Any:
        with self._lock:
            channel = self._channel
        try:
            return getattr(P2pServiceStub(with_auth(channel)), method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code not in _PASSING_CODES:
                cure = "check the token that the pod mounts for it, and that server and package are of one version"
                raise RendezvousUnavailable(
                    f"ModelExpress at {self.address}: {method}: {code.name} {details}; {cure}"
                ) from error
            self._renew_channel(channel)
            raise _Passing(f"{code.name} {details}") from error

    def _renew_channel(self, failed: grpc.Channel) -> None:
        """Connect anew: a server that moved behind its name is not found again by an old connection."""
        with self._lock:
            if self._channel is failed:
                self._channel = self._open_channel()
                failed.close()

    def _open_channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=_CHANNEL_OPTIONS)


def source_heartbeat(
    rendezvous: Rendezvous, sources: Iterable[EngineDescriptor], *, interval_s: float = HEARTBEAT_INTERVAL_S
) -> Heartbeat:
    """The heartbeat of a replica's sources: renews each, publishes what the server does not know. Not yet started."""
    kept = tuple(sources)

    def beat() -> None:
        for source in kept:
            rendezvous.renew(source, deadline=time.monotonic() + interval_s)

    return Heartbeat(f"sources-of-{kept[0].replica}", beat, interval_s=interval_s)


def _worker(source: EngineDescriptor, seal: Seal) -> Any:
    """What the server is given: nothing of how memory is reached outside the box."""
    box = seal.seal(
        zlib.compress(json.dumps(source.to_fields()).encode(), level=1),
        replica=source.replica,
        incarnation=source.incarnation,
        rank=source.rank,
    )
    descriptor = p2p_pb2.TensorDescriptor(name=SEALED, size=len(box), dtype=base64.b64encode(box).decode())
    return p2p_pb2.WorkerMetadata(
        worker_rank=source.rank,
        tensor_source=p2p_pb2.TensorSourceMetadata(tensors=[descriptor]),
        status=p2p_pb2.SOURCE_STATUS_INITIALIZING,
    )


def _opened(replica: str, incarnation: str, rank: int, worker: Any, seal: Seal) -> EngineDescriptor:
    boxes = [tensor.dtype for tensor in worker.tensor_source.tensors if tensor.name == SEALED]
    if len(boxes) != 1:
        raise RendezvousUnavailable(
            f"ModelExpress source {replica}/{incarnation}/{rank} has {len(boxes)} boxes of form {SEALED}, not one: is the engine's"
            " runtime of another version, or did a stranger publish it? Nothing is written there"
        )
    try:
        box = base64.b64decode(boxes[0], validate=True)
    except binascii.Error:
        box = b""  # no box of anybody's
    content = seal.open(box, replica=replica, incarnation=incarnation, rank=rank)
    return EngineDescriptor.from_fields(json.loads(zlib.decompress(content)))
