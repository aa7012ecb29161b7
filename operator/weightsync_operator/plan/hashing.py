"""Hashes and derived secrets: deterministic, so that two passes over one spec agree. Imports the standard library only."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any


def digest(value: Any, length_chars: int) -> str:
    """Hexadecimal hash of plain data, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length_chars]


def derive_password(operator_key: bytes, uid: str, purpose: str, rotation: int = 0) -> str:
    """A password of 40 hexadecimal characters for one resource and purpose; another key, uid or rotation gives another one."""
    message = f"{uid}|{rotation}|{purpose}".encode()
    return hmac.new(operator_key, message, hashlib.sha256).hexdigest()[:40]
