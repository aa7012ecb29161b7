"""Seals what an engine publishes, so that members of its session alone read how its memory is reached, or can say so.

ModelExpress admits by service account and keeps what it is given in a Redis; with remote keys and addresses, whoever reads either
could write an engine's memory. The key comes from the endpoint's token, which every trainer rank and engine of the session
has and ModelExpress has not. Imports cryptography; knows neither ModelExpress nor NIXL.
"""

from __future__ import annotations

import json
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from weightsync.errors import RendezvousUnavailable

_PURPOSE = "weightsync engine descriptor"
_KEY_BYTES = 32
_NONCE_BYTES = 12
"""Random: what is sealed under one key are the starts of engines, a few thousand, where 2^32 would begin to be risky."""


class Seal:
    """Seals and opens with AES-256-GCM under a key of one session's members.

    secret: what all members have and nobody else, of 128 random bits or more; session: theirs, of which the key is too.
    """

    def __init__(self, *, secret: str, session: str) -> None:
        self._session = session
        info = json.dumps([_PURPOSE, session]).encode()
        self._cipher = AESGCM(HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=info).derive(secret.encode()))

    def seal(self, content: bytes, *, replica: str, incarnation: str, rank: int) -> bytes:
        """`content` under a fresh nonce, to be opened as that rank's of that incarnation and no other's."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content, self._bound_to(replica, incarnation, rank))

    def open(self, sealed: bytes, *, replica: str, incarnation: str, rank: int) -> bytes:
        """What was sealed. Raises RendezvousUnavailable if another secret, session or rank sealed it, or somebody altered it."""
        nonce, content = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, content, self._bound_to(replica, incarnation, rank))
        except (InvalidTag, ValueError) as error:  # ValueError: too short for a nonce
            raise RendezvousUnavailable(
                f"ModelExpress source {replica}/{incarnation}/{rank} was not sealed by that rank as a member of session"
                f" {self._session}, or was altered since: nothing is written there. Do trainer and engines read the same"
                " endpoint.tokenFile? If they do, find out who else publishes to this server, and restart the engine"
            ) from error

    def _bound_to(self, replica: str, incarnation: str, rank: int) -> bytes:
        return json.dumps([_PURPOSE, self._session, replica, incarnation, rank]).encode()
