"""A line between two processes that have no ledger: JSON messages, a token at its beginning, a deadline for each.

A native trainer has one to each engine rank (`vllm.trainer`), `weightsync bench` one to its other process. A line that breaks tells
either side at once that the other one died. Standard library only.
"""

from __future__ import annotations

import hmac
import json
import select
import socket
import struct
from typing import Any

from weightsync.errors import RendezvousUnavailable, TransportError
from weightsync.waiting import Deadline

_LENGTH = struct.Struct("<I")
MESSAGE_LIMIT_BYTES = 256 << 20
"""A rank's layout and addresses: 0.3 MB for the 18,867 copies of a Qwen3-30B."""
TOKEN_LIMIT_BYTES = 256


class Channel:
    """JSON messages over one TCP connection, each way in order."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    def connect(cls, address: str, port: int, token: str, deadline: Deadline) -> Channel:
        """Reach who listens and show the token. Raises RendezvousUnavailable when nobody does."""
        try:
            connection = socket.create_connection((address, port), timeout=max(deadline.left_s, 0.001))
        except OSError as error:
            raise RendezvousUnavailable(
                f"nobody listens at {address}:{port} ({error}): is it up, and can it be reached from here?"
            ) from error
        channel = cls(connection)
        channel.send({"token": token}, deadline)
        return channel

    @classmethod
    def accept(cls, server: socket.socket, token: str, deadline: Deadline) -> Channel | None:
        """The next who connects; None when nobody came in a moment, or somebody without the token."""
        if not select.select([server], [], [], min(max(deadline.left_s, 0), 0.1))[0]:
            return None
        connection, _ = server.accept()
        channel = cls(connection)
        try:
            said = channel.receive(Deadline(min(deadline.left_s, 5.0)), limit_bytes=TOKEN_LIMIT_BYTES)["token"]
            if hmac.compare_digest(str(said).encode(), token.encode()):
                return channel
        except (TransportError, ValueError, KeyError, TypeError):
            pass
        channel.close()
        return None

    def send(self, message: dict[str, Any], deadline: Deadline) -> None:
        """Raises TransportError when the other side is gone, or does not read."""
        data = json.dumps(message).encode()
        try:
            self._socket.settimeout(max(deadline.left_s, 0.001))
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise TransportError(f"the other side cannot be told {sorted(message)}: {error}") from error

    def receive(self, deadline: Deadline, limit_bytes: int = MESSAGE_LIMIT_BYTES) -> dict[str, Any]:
        """The next message. Raises TransportError when the other side is gone, or says nothing until the deadline."""
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size, deadline))
        if length > limit_bytes:
            raise TransportError(
                f"a message of {length} bytes, {limit_bytes} are the most: is this port spoken to by others?"
            )
        return json.loads(self._take(length, deadline))

    def said_something(self) -> bool:
        """Whether `receive` would return, or raise, without waiting."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        self._socket.close()

    def _take(self, n_bytes: int, deadline: Deadline) -> bytes:
        data = bytearray()
        while len(data) < n_bytes:
            try:
                self._socket.settimeout(max(deadline.left_s, 0.001))
                part = self._socket.recv(min(n_bytes - len(data), 1 << 20))
            except OSError as error:
                raise TransportError(f"the other side said nothing: {error}") from error
            if not part:
                raise TransportError("the other side is gone: its connection closed")
            data += part
        return bytes(data)
