"""The session's ledger in Redis: the one place that says which epoch may push, which version is served, who takes part.

Every change is a Lua script, so that two processes can never both win (design section 8). Engines keep serving when the
ledger is gone; pushes fail with LedgerUnavailable. Imports redis and `weightsync.wire`; never torch, NIXL or vLLM.
"""

from __future__ import annotations

from weightsync.rendezvous.handshake import HandshakeLedger
from weightsync.rendezvous.members import MemberLedger
from weightsync.rendezvous.repairs import RepairLedger


class Ledger(HandshakeLedger, MemberLedger, RepairLedger):
    """A thread-safe client of one session's ledger; a context manager. Every method may raise LedgerUnavailable.

    `Ledger.from_contract(contract)` opens the operator's; `ledger.until(deadline)` is the same, patient until then.
    """
