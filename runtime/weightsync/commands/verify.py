"""`weightsync verify`: does every engine's live memory still hold what the ledger says was committed?

Each engine measures all its weights again, between two pushes, and answers with their digest. One that differs from what it held
stops serving by itself (DIRTY), until the next push repairs it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
import httpx

from weightsync.config import Contract
from weightsync.errors import ConfigError
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Head, Member
from weightsync.verify import to_hex
from weightsync.wire import Decision, ReplicaState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What one engine replica was found to hold."""

    replica: str
    version: int | None
    """None when it could not be asked."""
    digest: str
    """Hexadecimal, of live memory, over all its ranks; empty when it could not be asked."""
    fault: str
    """What is wrong, in words; empty when it holds the committed version."""


def verify(contract: Contract, *, replica: str | None = None) -> list[Finding]:
    """Have the engines of the session, or the one named, measure their memory, and compare with the ledger.

    Raises ConfigError when the session has no such engine, LedgerUnavailable.
    """
    with Ledger.from_contract(contract) as ledger:
        members, head = ledger.members(), ledger.head()
        lost = set(ledger.lost_members({name: member.incarnation for name, member in members.items()}))
        committed = _committed_digest(ledger, head)
    if replica is not None:
        members = {name: member for name, member in members.items() if name == replica}
    if not members:
        wanted = "has no engine" if replica is None else f"has no engine {replica}"
        raise ConfigError(f"session {contract.session} {wanted}: are engines running, and is this their contract?")
    headers = {"Authorization": f"Bearer {contract.endpoint_token()}"}
    with httpx.Client(headers=headers, trust_env=False, timeout=contract.transfer.timeout_seconds) as http:
        return [
            _lost(member) if name in lost else _ask(http, member, head, committed) for name, member in members.items()
        ]


def run(*, config: Path | None = None, replica: str | None = None, as_json: bool = False) -> int:
    """The command: a line an engine on standard output. Returns the exit status, 1 when an engine differs.

    `config` is the session's contract; without it the one that WEIGHTSYNC_CONFIG names. Raises what `verify` raises.
    """
    contract = Contract.load() if config is None else Contract.load({"WEIGHTSYNC_CONFIG": str(config)})
    findings = verify(contract, replica=replica)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            said = finding.fault or f"holds version {finding.version}, digest {finding.digest}"
            print(f"{'DIFFERS' if finding.fault else 'ok':8} {finding.replica}: {said}")
    return 1 if any(finding.fault for finding in findings) else 0


HELP = """Have every engine of a session measure its live memory again, and compare with what was committed.

An engine whose memory differs stops serving by itself, until the next push repairs it.

\b
Example:
  weightsync verify --config contract.json

Exit codes: 0 every engine holds the committed version; 1 one does not, or could not be asked; 2 the question is wrong.
"""


@click.command("verify", help=HELP)
@click.option("--config", type=click.Path(path_type=Path), help="The session's contract; default $WEIGHTSYNC_CONFIG.")
@click.option("--replica", help="Ask this engine alone.")
@click.option("--json", "as_json", is_flag=True, help="The findings as a JSON list.")
def command(**options: Any) -> None:
    sys.exit(run(**options))


def _committed_digest(ledger: Ledger, head: Head) -> str | None:
    """Digest of the committed version; None before the first, and when it has fallen off the ledger's list."""
    for summary in ledger.pushes():
        if summary.outcome == Decision.COMMIT and (summary.epoch, summary.version) == head.order:
            return summary.digest
    return None


def _lost(member: Member) -> Finding:
    fault = "its lease ran out: the engine ended, or cannot reach the ledger"
    return Finding(replica=member.replica, version=None, digest="", fault=fault)


def _ask(http: httpx.Client, member: Member, head: Head, committed: str | None) -> Finding:
    try:
        answer = http.post(f"{member.url}/weightsync/v1/verify")
    except httpx.HTTPError as error:
        fault = f"{member.url} did not answer: {type(error).__name__} {error}"
        return Finding(replica=member.replica, version=None, digest="", fault=fault)
    if not answer.is_success:
        fault = f"{member.url} answered {answer.status_code}: {answer.text[:200]}"
        return Finding(replica=member.replica, version=None, digest="", fault=fault)
    state: dict[str, Any] = answer.json()
    digest = to_hex(sum(int(part, 16) for part in state["digest"].split("+")))
    fault = ""
    if state["state"] != ReplicaState.CLEAN:
        fault = f"{state['state']}: {state['reason']}"
    elif state["version"] != head.version:
        fault = f"holds version {state['version']}, version {head.version} is committed"
    elif committed is not None and digest != committed:
        fault = f"version {head.version} was committed with digest {committed}, its memory holds {digest}"
    return Finding(replica=member.replica, version=state["version"], digest=digest, fault=fault)
