"""Prometheus metrics of a trainer rank and of an engine replica; a test holds the list in docs/operations.md against this.

Each side has a registry of its own: vLLM's, which the engine's process also has, is in files where there are several API
servers. Imports prometheus_client and the runtime's records only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest, start_http_server

from weightsync.errors import ConfigError
from weightsync.rendezvous.handshake import Applied
from weightsync.telemetry import Span, Transports, seconds_of
from weightsync.wire import PushSummary, ReplicaState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class TrainerMetrics:
    """What one trainer rank has pushed."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._pushes = Counter(
            "weightsync_pushes", "Attempts to push by how they ended.", ["outcome"], registry=registry
        )
        self._bytes = Counter(
            "weightsync_pushed_bytes", "Payload of committed pushes, counted at the receivers.", registry=registry
        )
        self._version = Gauge("weightsync_version", "Version that was committed last.", registry=registry)
        self._epoch = Gauge("weightsync_epoch", "Incarnation of the trainer.", registry=registry)
        self._seconds = Gauge("weightsync_push_seconds", "The last committed push, whole.", registry=registry)
        self._pause = Gauge("weightsync_push_pause_seconds", "The longest pause of a replica in it.", registry=registry)
        self._phases = Gauge("weightsync_push_phase_seconds", "Its phases on this rank.", ["phase"], registry=registry)
        self._peer_seconds = Gauge(
            "weightsync_peer_wire_seconds",
            "Its wire to each engine rank, by NIXL's clock.",
            ["peer"],
            registry=registry,
        )
        self._peer_bytes = Gauge(
            "weightsync_peer_wire_bytes", "Payload of it to each engine rank.", ["peer"], registry=registry
        )
        self._transports = Gauge(
            "weightsync_transport_info",
            "1 for each UCX transport that this rank writes with, and how that is known.",
            ["transport", "proof"],
            registry=registry,
        )

    def committed(self, summary: PushSummary, spans: Iterable[Span], moved_by: Transports) -> None:
        """A push was committed; `spans` are this rank's."""
        told = list(spans)
        self._pushes.labels("committed").inc()
        self._bytes.inc(summary.bytes)
        self._version.set(summary.version)
        self._epoch.set(summary.epoch)
        self._seconds.set(summary.seconds)
        self._pause.set(summary.pause_seconds)
        for gauge in (self._phases, self._peer_seconds, self._peer_bytes, self._transports):
            gauge.clear()  # peers and transports of an earlier push are no more
        for phase, seconds in seconds_of(told).items():
            self._phases.labels(phase).set(seconds)
        for span in told:
            if span.peer:
                self._peer_seconds.labels(span.peer).set(span.seconds)
                self._peer_bytes.labels(span.peer).set(span.bytes)
        for name in moved_by.names:
            self._transports.labels(name, moved_by.proof).set(1)

    def failed(self) -> None:
        """An attempt to push was not committed."""
        self._pushes.labels("failed").inc()

    def serve(self, address: str, port: int) -> None:
        """Answer scrapes on a thread for as long as the process lives. Raises ConfigError when the port is taken."""
        try:
            start_http_server(port, address, self.registry)
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be served at {address}:{port} ({error.strerror}): telemetry.metricsPort of the contract plus "
                "LOCAL_RANK must be free"
            ) from error


class ReplicaMetrics:
    """What one engine replica holds and has taken."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._pushes = Counter(
            "weightsync_replica_pushes",
            "Pushes that it opened, by how they ended here.",
            ["outcome"],
            registry=registry,
        )
        self._repairs = Counter(
            "weightsync_replica_repairs",
            "Repairs from a peer that it began, by how they ended.",
            ["outcome"],
            registry=registry,
        )
        self._bytes = Gauge(
            "weightsync_replica_received_bytes",
            "Payload counted and verified by its ranks since they began.",
            registry=registry,
        )
        self._target_bytes = Gauge(
            "weightsync_replica_target_bytes",
            "Payload of one push by where it lands: direct, or in load format to be replayed.",
            ["kind"],
            registry=registry,
        )
        self._version = Gauge("weightsync_replica_version", "Version that the live weights hold.", registry=registry)
        self._committed = Gauge(
            "weightsync_replica_committed_version",
            "Version that the session has committed, as last read.",
            registry=registry,
        )
        self._serving = Gauge("weightsync_replica_serving", "1 when it answers requests.", registry=registry)
        self._state = Gauge(
            "weightsync_replica_state", "1 for the state that its weights are in.", ["state"], registry=registry
        )
        self._pause = Gauge(
            "weightsync_replica_pause_seconds", "Pause of the last push that it applied.", registry=registry
        )
        self._phases = Gauge(
            "weightsync_replica_phase_seconds", "Its phases of that push.", ["phase"], registry=registry
        )

    def applied(self, applied: Applied) -> None:
        """A committed push is served."""
        self._pushes.labels("committed").inc()
        self._pause.set(applied.pause_seconds)
        for phase, seconds in seconds_of(applied.spans).items():
            self._phases.labels(phase).set(seconds)

    def aborted(self) -> None:
        """A push that was opened here was not committed."""
        self._pushes.labels("aborted").inc()

    def repair_ended(self, outcome: str) -> None:
        """A repair of this replica by a peer has ended: repaired or failed."""
        self._repairs.labels(outcome).inc()

    def render(
        self,
        *,
        state: ReplicaState,
        version: int,
        committed: int | None,
        serving: bool,
        received_bytes: int,
        target_bytes: Mapping[str, int],
    ) -> bytes:
        """The text for a scrape, with what the replica is now. `committed` is None until the ledger was read."""
        self._version.set(version)
        self._committed.set(math.nan if committed is None else committed)
        self._serving.set(serving)
        self._bytes.set(received_bytes)
        for kind, count in target_bytes.items():
            self._target_bytes.labels(kind).set(count)
        for each in ReplicaState:
            self._state.labels(each).set(each is state)
        return generate_latest(self.registry)
