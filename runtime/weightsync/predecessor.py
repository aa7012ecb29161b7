"""The account of a push whose coordinator is gone: a gang that dies whole leaves it open, and in no list of pushes.

The trainer of the next epoch closes it before its own first push. Imports the ledger, no transport.
"""

from __future__ import annotations

import dataclasses
import logging

from weightsync.accounts import unaccounted
from weightsync.rendezvous.ledger import Ledger
from weightsync.wire import Decision, PushSummary

logger = logging.getLogger(__name__)


def account_for_predecessor(ledger: Ledger, epoch: int, successor: int) -> PushSummary | None:
    """List the last push of `epoch`, aborting it if it is open, unless its own coordinator has; None when there is nothing to tell.

    `successor` is the epoch in force. A push that was committed without an account is one all the same.
    """
    current = ledger.current_push(epoch)
    record = None if current is None else ledger.push(current[1])
    if record is None or ledger.summary(record.push_id) is not None:
        return None
    gone = f"the trainer of epoch {epoch} ended without an account of it, epoch {successor} is in force"
    verdict = ledger.decide(record.push_id, Decision.ABORT, gone)
    if verdict.decision is Decision.ABORT and verdict.reason != gone:
        verdict = dataclasses.replace(verdict, reason=f"{verdict.reason}; {gone}")
    summary = dataclasses.replace(unaccounted(record, verdict), finished_at=ledger.now())
    ledger.publish_push(summary)
    logger.warning("push %s: %s %s", record.push_id, verdict.decision, verdict.reason or gone)
    return summary
