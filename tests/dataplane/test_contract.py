"""The contract: what is unknown is refused within one minor version, ignored from a later one; another major is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from weightsync.config import CONTRACT_VERSION, Contract
from weightsync.errors import ConfigError

MAJOR, MINOR = map(int, CONTRACT_VERSION.split("."))


def document(**more: Any) -> str:
    return json.dumps(
        {
            "contract": CONTRACT_VERSION,
            "session": "s-1",
            "name": "demo",
            "model": {"path": "/models/m"},
            "redis": {"host": "redis"},
            "modelExpress": {"address": "mx:8001"},
            "endpoint": {"tokenFile": "/token"},
            "fabric": {"profile": "tcp", "transports": ["tcp"]},
            **more,
        }
    )


def test_a_document_of_this_version() -> None:
    assert Contract.parse(document()).transfer.format == "auto"


@pytest.mark.parametrize(
    ("more", "match"), [({"surprise": 1}, "surprise"), ({"redis": {"host": "r", "prot": 1}}, "redis.prot")]
)
def test_an_unknown_key_is_refused_with_its_path(more: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=f"contract has 1 bad field.*{match}"):
        Contract.parse(document(**more))


def test_a_later_minor_version_may_say_more() -> None:
    later = document(contract=f"{MAJOR}.{MINOR + 1}", surprise=1, redis={"host": "r", "sentinels": True})
    assert Contract.parse(later).redis.host == "r"


@pytest.mark.parametrize("version", [f"{MAJOR + 1}.0", f"{MAJOR + 1}.{MINOR + 1}", "one", f"{MAJOR}"])
def test_another_major_version_is_refused(version: str) -> None:
    with pytest.raises(ConfigError, match="contract"):
        Contract.parse(document(contract=version))


@pytest.mark.parametrize("transfer", [{"commit": "staged"}, {"staging": "device"}])
def test_staging_goes_with_a_staged_commit(transfer: dict[str, str]) -> None:
    """An engine that was to stage into nothing would write into live memory while it serves."""
    with pytest.raises(ConfigError, match="staged needs device or pinnedHost, inPlace none"):
        Contract.parse(document(transfer=transfer))


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ConfigError, match="bad field"):
        Contract.parse("{")
