"""Reads the session's pushes out of the ledger, in an engine's pod: it has the contract, the password and the client.

The status shows the newest push only; the report wants all of them. Imports the demo's own modules.
"""

from __future__ import annotations

from typing import Any

from e2e.demo.cluster import Demo
from e2e.demo.report import VersionPush
from e2e.lab.errors import LabError

READ = """
import dataclasses, json
from weightsync.config import Contract
from weightsync.rendezvous.ledger import Ledger
with Ledger.from_contract(Contract.load()) as ledger:
    print(json.dumps([dataclasses.asdict(push) for push in ledger.pushes()]))
"""


def read_pushes(demo: Demo) -> tuple[list[VersionPush], list[str]]:
    """Committed versions in their order, and the pushes that were aborted, in words."""
    engines = demo.engines()
    if not engines:
        raise LabError("no engine is left to read the ledger with", cure="kubectl get pods")
    return split(demo.kubectl.python(engines[0]["metadata"]["name"], READ, container="engine"))


def split(pushes: list[dict[str, Any]]) -> tuple[list[VersionPush], list[str]]:
    """Committed versions and aborted pushes; a catch-up brings no version of its own and is left out."""
    mine = [push for push in pushes if not push["catch_up"]]
    committed = [
        VersionPush(**{name: push[name] for name in VersionPush.model_fields})
        for push in mine
        if push["outcome"] == "COMMIT"
    ]
    aborted = [f"version {push['version']}: {push['reason']}" for push in mine if push["outcome"] != "COMMIT"]
    return sorted(committed, key=lambda push: push.version), aborted
