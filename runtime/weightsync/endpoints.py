"""Calls to the engines' endpoints, over connections that stay open from push to push.

A push asks every replica at once, from one process: what a call costs here is paid once a replica, within the pause. The
standard library's client takes a quarter of the processor time of httpx. Imports the standard library only.
"""

from __future__ import annotations

import http.client
import json
import urllib.parse
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What an engine said."""

    status: int
    text: str

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def message(self) -> str:
        """The error in words, from the shape that OpenAI clients read, or whatever came instead."""
        try:
            return json.loads(self.text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return f"HTTP {self.status} {self.text[:200]}"


class Endpoints:
    """A client of many engines; calls to different ones may run at once, on any threads."""

    def __init__(self, *, token: str) -> None:
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connections: dict[str, http.client.HTTPConnection] = {}

    def post(self, base: str, path: str, body: str, *, timeout_s: float) -> Answer:
        """POST to `base` (http://host:port). Raises OSError or http.client.HTTPException when no answer came."""
        kept = self._connections.pop(base, None)
        if kept is not None:
            try:
                return self._ask(base, kept, path, body, timeout_s)
            except ConnectionError:  # the engine closed it while it lay idle, and has not seen this call
                pass
        parts = urllib.parse.urlsplit(base)
        made = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
        return self._ask(base, made, path, body, timeout_s)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _ask(self, base: str, connection: http.client.HTTPConnection, path: str, body: str, timeout_s: float) -> Answer:
        """Ask, and keep the connection only when the whole answer was read."""
        try:
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            connection.request("POST", path, body.encode(), self._headers)
            response = connection.getresponse()
            answer = Answer(response.status, response.read().decode(errors="replace"))
        except BaseException:
            connection.close()
            raise
        self._connections[base] = connection
        return answer
