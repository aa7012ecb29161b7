"""Members of a session and the leases that tell who lives, replicas and trainer ranks alike.

A part of `Ledger`; imports no client of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import redis

from weightsync.errors import FencedOut
from weightsync.rendezvous import scripts
from weightsync.rendezvous.connection import LedgerConnection
from weightsync.rendezvous.records import Member
from weightsync.wire import Keys, ReplicaStatus

RENEWED_WITHIN_S = 8.0
"""A client that could not reach the ledger a moment ago believes no lease's absence for so long: longer than any
holder's interval between two beats, by which the living have renewed theirs."""


class MemberLedger(LedgerConnection):
    """The part of the ledger that lists who takes part."""

    def join(self, member: Member, ttl_s: float, status: ReplicaStatus | None = None) -> Member:
        """Enter or renew `member` for `ttl_s` seconds and re-assert what it holds; returns it with `joined_at` set.

        `status` is shown to the operator by the same call. Called again each third of the lease; an entry that vanished is made
        anew. `witness` knows the head from here on. Raises FencedOut when a later incarnation of the replica has joined.
        """
        fields = dict(vars(member))
        joined_at = fields.pop("joined_at")
        self._witness(
            lambda known: dataclasses.replace(
                known.with_committed(member.epoch, member.version), seen_epoch=max(known.seen_epoch, member.seen_epoch)
            )
        )
        shown = "" if status is None else _unstamped(status)
        arguments = (member.replica, member.incarnation, joined_at, json.dumps(fields), round(ttl_s * 1000), shown)
        outcome, value, *head = self._run_witnessed("join", scripts.JOIN, *arguments)
        if outcome == "REPLACED":
            raise FencedOut(
                f"replica {member.replica}: incarnation {member.incarnation} was replaced by {value}; end this engine"
            )
        self._note_head(**dict(zip(("epoch", "version", "version_epoch", "published"), head, strict=True)))
        return dataclasses.replace(member, joined_at=float(value))

    def leave(self, replica: str, incarnation: str) -> bool:
        """Take a replica out of the session. False when that incarnation is not (or no longer) in it."""
        return bool(self._run("leave", scripts.LEAVE, replica, incarnation))

    def members(self) -> dict[str, Member]:
        """Every replica that joined and did not leave, the dead ones too, by name."""
        return self._read_members()[0]

    def live_members(self) -> dict[str, Member]:
        """The replicas whose lease lives, by name. A ledger that lost its data has them after their next beats."""
        members, leases = self._read_members()
        return {name: member for name, member in members.items() if leases.get(name) == member.incarnation}

    def lost_members(self, incarnations: Mapping[str, str]) -> tuple[str, ...]:
        """Which of these replicas (name -> incarnation) are dead, cut off, or another incarnation by now."""
        if not incarnations:
            return ()
        names, keys = sorted(incarnations), Keys(self.session)
        leases: Any = self._call(
            "read leases", lambda client: client.mget([keys.replica_lease(name) for name in names])
        )
        absent_is_lost = self.calm_s >= RENEWED_WITHIN_S

        def is_lost(name: str, lease: str | None) -> bool:
            return absent_is_lost if lease is None else lease != incarnations[name]

        return tuple(name for name, lease in zip(names, leases, strict=True) if is_lost(name, lease))

    def hold_writer_lease(self, epoch: int, rank: int, ttl_s: float) -> None:
        """Say that a trainer rank lives, for `ttl_s` seconds."""
        key = Keys(self.session).writer_lease(epoch, rank)
        self._call("hold writer lease", lambda client: client.set(key, "1", px=round(ttl_s * 1000)))

    def drop_writer_lease(self, epoch: int, rank: int) -> None:
        """Say that a trainer rank has left; its heartbeat must have ended."""
        key = Keys(self.session).writer_lease(epoch, rank)
        self._call("drop writer lease", lambda client: client.delete(key))

    def lost_writers(self, epoch: int, world_size: int) -> tuple[int, ...]:
        """Trainer ranks of `epoch` that hold no lease: dead, cut off, or never begun.

        None is called lost right after the ledger was away, see RENEWED_WITHIN_S.
        """
        keys = [Keys(self.session).writer_lease(epoch, rank) for rank in range(world_size)]
        leases = self._call("read writer leases", lambda client: client.mget(keys))
        if self.calm_s < RENEWED_WITHIN_S:
            return ()
        return tuple(rank for rank, lease in enumerate(leases) if lease is None)  # type: ignore[arg-type]

    def publish_replica_status(self, status: ReplicaStatus) -> None:
        """Show a replica's state to the operator, stamped with the ledger's clock."""
        self._run("publish status", scripts.PUBLISH_STATUS, status.name, _unstamped(status))

    def replica_statuses(self) -> dict[str, ReplicaStatus]:
        """The last status of each replica, by name."""
        texts = self._call("read statuses", lambda client: client.hgetall(Keys(self.session).replicas))
        return {str(name): ReplicaStatus.from_json(text) for name, text in texts.items()}  # type: ignore[union-attr]

    def _read_members(self) -> tuple[dict[str, Member], Mapping[str, str]]:
        """All members, and the incarnation that each live lease names."""
        keys = Keys(self.session)

        def read(client: redis.Redis) -> tuple[dict[str, Member], dict[str, str]]:
            texts: dict[str, str] = client.hgetall(keys.members)  # type: ignore[assignment]
            members = {name: Member.from_json(text) for name, text in sorted(texts.items())}
            leases: list[str | None] = client.mget([keys.replica_lease(name) for name in members]) if members else []  # type: ignore[assignment]
            return members, {name: lease for name, lease in zip(members, leases, strict=True) if lease is not None}

        return self._call("read members", read)


def _unstamped(status: ReplicaStatus) -> str:
    """As JSON, without the time that the ledger adds by its own clock."""
    return json.dumps({name: value for name, value in vars(status).items() if name != "updated_at"})
