"""What a message about a push must carry to be believed, and the rules by which an older one is refused. Pure; no I/O.

A fence keeps late messages out, not late bytes: memory that was offered to a writer stays quarantined until that writer
said that all its handles are terminal, or its access is proved gone (design section 8).
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import struct

from weightsync.errors import FencedOut
from weightsync.rendezvous.records import PushRecord

_PARTIAL = struct.Struct("<IQ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fence:
    """The push that a receiver has opened: whoever speaks of another one is refused."""

    session: str
    epoch: int
    version: int
    push_id: str
    plan_digest: str

    @classmethod
    def of(cls, push: PushRecord, layout_digest: str) -> Fence:
        """The fence of the receivers that have this layout. Raises FencedOut if the push has no plan for it."""
        plan_digest = push.plan_digests.get(layout_digest)
        if plan_digest is None:
            known = ", ".join(sorted(push.plan_digests)) or "none"
            raise FencedOut(
                f"push {push.push_id} has no plan for layout {layout_digest}; it has plans for {known}: plan again"
            )
        return cls(
            session=push.session,
            epoch=push.epoch,
            version=push.version,
            push_id=push.push_id,
            plan_digest=plan_digest,
        )

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, version), by which pushes are older or newer."""
        return (self.epoch, self.version)

    def require_admissible(self, *, session: str, seen_epoch: int, held: tuple[int, int], repairs: bool) -> None:
        """Raise FencedOut unless this push may be opened by a receiver that holds `held`, a committed (epoch, version).

        With `repairs` (a catch-up, or a receiver that is DIRTY) the held version itself may be written again.
        """
        if self.session != session:
            raise FencedOut(f"push {self.push_id} is of session {self.session}, this engine of {session}")
        if self.epoch < seen_epoch:
            raise FencedOut(f"push {self.push_id} is of epoch {self.epoch}, this engine has seen epoch {seen_epoch}")
        if self.order < held or (self.order == held and not repairs):
            raise FencedOut(
                f"push {self.push_id} brings (epoch, version) {self.order}, this engine holds {held}:"
                " push a newer version"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notification:
    """A writer's last word to one receiver: all its writes of this push are done, and what they add up to."""

    session: str
    push_id: str
    epoch: int
    version: int
    plan_digest: str
    writer_rank: int
    bytes_written: int
    partial_digests: dict[int, int]
    """Target index -> this writer's share of the target's digest, modulo 2^64."""

    def encode(self) -> bytes:
        """Bytes for a NIXL notification: 16 bytes of text a target and about 200 more."""
        partials = b"".join(_PARTIAL.pack(*item) for item in sorted(self.partial_digests.items()))
        fields = {**vars(self), "partial_digests": base64.b64encode(partials).decode()}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, message: bytes) -> Notification:
        """Raises FencedOut if the message is not a notification of this version of the runtime."""
        try:
            fields = json.loads(message)
            partials = base64.b64decode(fields.pop("partial_digests"), validate=True)
            return cls(**fields, partial_digests=dict(_PARTIAL.iter_unpack(partials)))
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, binascii.Error) as error:
            raise FencedOut(
                f"a notification of {len(message)} bytes is not ours ({error}): is the writer of another version?"
            ) from error

    def require(self, fence: Fence) -> None:
        """Raise FencedOut unless this speaks of the push that `fence` opened."""
        for field in ("session", "push_id", "epoch", "version", "plan_digest"):
            said, want = getattr(self, field), getattr(fence, field)
            if said != want:
                raise FencedOut(f"writer {self.writer_rank} speaks of {field} {said}, push {fence.push_id} has {want}")
