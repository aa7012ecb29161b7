"""How a push went, as the ledger lists it: of what all sides said, or of what is known where its coordinator has not told.

Pure, and imports no transport.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from weightsync import verify
from weightsync.participants import Participants
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.records import PushRecord, Verdict, Vote, WriterReport
from weightsync.telemetry import Transports, agree_on_transports, longest_phase
from weightsync.wire import Decision, PushSummary


def summarize(
    record: PushRecord,
    verdict: Verdict,
    participants: Participants,
    votes: Mapping[tuple[str, int], Vote],
    applied: Mapping[str, Applied],
    reports: Mapping[int, WriterReport],
    phases: Mapping[str, float],
    seconds: float,
) -> PushSummary:
    """Of a push that was decided: what its replicas, its ranks and its coordinator measured; `finished_at` is left to be told."""
    committed = verdict.decision is Decision.COMMIT
    received = sum(vote.bytes for vote in votes.values())
    wire_s = longest_phase((report.spans for report in reports.values()), "wire")
    holders = sorted(participants.left) if committed else sorted(record.members)
    digests = dict.fromkeys(holders, 0)
    for vote in votes.values():
        if vote.replica in digests:
            digests[vote.replica] += int(vote.digest, 16)
    measured = {verify.to_hex(digest) for digest in digests.values()}
    served = [verify.sum_hex(item.digest.split("+")) for item in applied.values()]
    moved_by = agree_on_transports(
        Transports(names=report.transports, proof=report.transport_proof) for report in reports.values() if report.bytes
    )
    return dataclasses.replace(
        unaccounted(record, verdict),
        seconds=seconds,
        bytes=received,
        gbps=received / wire_s / 1e9 if wire_s and received else 0.0,
        pause_seconds=max((item.pause_seconds for item in applied.values()), default=0.0),
        phases=dict(phases),
        copy_seconds=max((item.copy_seconds for item in applied.values()), default=0.0),
        replicas=holders,
        dropped=participants.dropped,
        digest=min(measured) if committed else "",
        digest_ok=committed
        and record.verify != "off"
        and applied.keys() >= set(holders)
        and len(measured) == 1
        and set(served) == measured,
        transports=moved_by.names,
        transport_proof=moved_by.proof,
    )


def unaccounted(record: PushRecord, verdict: Verdict) -> PushSummary:
    """What is known of a push that was decided, and whose coordinator has not told more."""
    return PushSummary(
        push_id=record.push_id,
        epoch=record.epoch,
        version=record.version,
        step=record.step,
        outcome=verdict.decision,
        reason=verdict.reason,
        catch_up=record.catch_up,
        replicas=sorted(record.members),
    )
