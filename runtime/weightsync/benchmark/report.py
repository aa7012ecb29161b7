"""What a bench found, as a table and as a JSON document. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from weightsync.benchmark.conversion import COPY, Rates
from weightsync.benchmark.wire import Wire

_WIDTH = 58
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that one run measured."""

    payload_bytes: int
    turns: int
    device: str
    wire: Wire
    conversion: Rates
    expected: Sequence[str] | None = None
    """Transports of which the session's fabric wants one in use; None when nobody said."""

    @property
    def as_expected(self) -> bool:
        """False when none of the expected transports is among those in use."""
        return self.expected is None or bool(set(self.expected) & set(self.wire.transports.names))

    @property
    def best(self) -> str:
        """The manner of the fastest plain stream."""
        return min(self.wire.plain, key=lambda name: self.wire.plain[name])

    def document(self) -> dict[str, Any]:
        """Rates in GB/s (1e9 bytes a second): payload bytes on the wire, bytes read and written in conversions."""
        best_s = self.wire.plain[self.best]
        return {
            "payload_bytes": self.payload_bytes,
            "turns": self.turns,
            "trainer_device": self.device,
            "engine_device": self.wire.engine_device,
            "transports": list(self.wire.transports.names),
            "transport_proof": self.wire.transports.proof,
            "transports_expected": None if self.expected is None else list(self.expected),
            "transports_as_expected": self.as_expected,
            "best_stream": self.best,
            "streams": {name: self.payload_bytes / taken / 1e9 for name, taken in self.wire.plain.items()},
            "pushes": [
                {
                    "write_bytes": size,
                    "writes": self.payload_bytes // size,
                    "gbps": self.payload_bytes / taken / 1e9,
                    "of_best_stream": best_s / taken,
                }
                for size, taken in self.wire.pushes.items()
            ],
            "conversion": {name: moved / taken / 1e9 for name, (taken, moved) in self.conversion.items()},
        }

    def text(self) -> str:
        """For people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        found = self.document()
        best, copy = found["streams"][self.best], found["conversion"][COPY]
        what = f"{size_text(self.payload_bytes)} a turn from {self.device} to {found['engine_device']}"
        yield f"{what}, medians of {self.turns} turns at most"
        yield f"transports: {self._transports()}"
        yield ""
        yield f"{'on the wire':<{_WIDTH + 2}}{'GB/s':>8}  of the best stream"
        for name, gbps in found["streams"].items():
            yield _row(f"plain NIXL, {name}", gbps, best)
        for push in found["pushes"]:
            what = f"push, {push['writes']} writes of {size_text(push['write_bytes'])}"
            yield _row(what, push["gbps"], best)
        yield "every push's bytes were measured where they arrived, and are what was sent"
        yield ""
        yield f"{'conversion, bytes read and written':<{_WIDTH + 2}}{'GB/s':>8}  of a plain copy"
        for name, gbps in found["conversion"].items():
            yield _row(name, gbps, copy)

    def _transports(self) -> str:
        names, proof = self.wire.transports.names, self.wire.transports.proof
        told = {"ucx": "in UCX's own words", "exclusion": "UCX_TLS leaves no other"}.get(proof, "UCX did not tell")
        said = f"{', '.join(names) or 'unknown'} ({told})"
        if self.expected is None:
            return said
        judged = (
            "as the fabric wants" if self.as_expected else f"NONE of what the fabric wants: {', '.join(self.expected)}"
        )
        return f"{said}, {judged}"


def size_text(length_bytes: int) -> str:
    """The largest binary unit that divides it."""
    for unit, name in _UNITS:
        if length_bytes % unit == 0:
            return f"{length_bytes // unit} {name}"
    return f"{length_bytes} bytes"


def _row(what: str, gbps: float, roof: float) -> str:
    return f"  {what:<{_WIDTH}}{gbps:8.2f}  {gbps / roof:6.0%}"
