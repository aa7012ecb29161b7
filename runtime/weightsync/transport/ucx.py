"""What UCX says that it moves bytes with: its own table of the protocol it chose for remote writes, read from its log.

UCX 1.23 tells no API that NIXL passes on, but prints on demand (UCX_PROTO_INFO=y) which protocol and lanes serve each operation
to each kind of peer, at the moment it chooses them:

    | writer inter-node cfg#1                                  |
    | remote memory write by ucp_put* from host memory to host |
    | 0..inf | zero-copy   | 52% on tcp/lo and 48% on tcp/eth0 |

Standard library only.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_VARIABLES = ("UCX_PROTO_INFO", "UCX_LOG_LEVEL", "UCX_LOG_FILE")
_CONFIG = re.compile(r"\| .* (self|intra-node|inter-node) cfg#\d+ ")
_WRITE = re.compile(r"\| remote memory write by ucp_put")
_ROW = re.compile(r"\| +[\d.KMGinf]+ +\|[^|]*\|([^|]*)\|")
_LANE = re.compile(r"([a-z][a-z0-9_]*)/[\w:.\-]+")
_COMPLAINT = re.compile(r"UCX +(WARN|ERROR|FATAL) +(.*)")


class UcxLog:
    """The log of UCX in this process, or nothing where its user has asked for another one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._read_bytes = 0
        self._rest = ""
        self._asking = threading.Lock()
        self._parser = _Parser()

    @classmethod
    def make(cls, environ: Mapping[str, str] = os.environ) -> UcxLog:
        """A log in a file of our own; none where one of UCX's variables for it is set: its words are wanted elsewhere."""
        if any(name in environ for name in _VARIABLES):
            return cls(None)
        descriptor, name = tempfile.mkstemp(prefix=f"weightsync-ucx-{os.getpid()}-", suffix=".log")
        os.close(descriptor)
        atexit.register(Path(name).unlink, missing_ok=True)
        return cls(Path(name))

    @contextmanager
    def asked_for(self, environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
        """Make an agent within: UCX reads what to tell and where when it is loaded, and once more for each agent.

        The variables are gone afterwards, so that child processes write no file of ours.
        """
        if self._path is None:
            yield
            return
        with self._asking:  # loans make their agents on threads
            environ.update(zip(_VARIABLES, ("y", "info", str(self._path)), strict=True))
            try:
                yield
            finally:
                for name in _VARIABLES:
                    environ.pop(name, None)

    def transports(self) -> tuple[str, ...]:
        """Transports of all remote writes to other processes so far, sorted; empty when UCX has told of none.

        What UCX complained of meanwhile goes to our log: its file hides it otherwise.
        """
        if self._path is not None:
            self._read(self._path)
        return tuple(sorted(self._parser.transports))

    def _read(self, path: Path) -> None:
        try:
            with path.open(errors="replace") as file:
                file.seek(self._read_bytes)
                text = self._rest + file.read()
                self._read_bytes = file.tell()
        except OSError as error:
            logger.warning("UCX's log cannot be read: %s", error)
            return
        *lines, self._rest = text.split("\n")
        for line in lines:
            complaint = _COMPLAINT.search(line)
            if complaint is not None:
                logger.warning("UCX %s: %s", complaint[1].lower(), complaint[2])
            self._parser.feed(line)


class _Parser:
    """Reads the tables line by line."""

    def __init__(self) -> None:
        self.transports: set[str] = set()
        self._to_others = False
        self._writes = False

    def feed(self, line: str) -> None:
        config = _CONFIG.search(line)
        if config is not None:
            self._to_others, self._writes = config[1] != "self", False
        elif _WRITE.search(line):
            self._writes = self._to_others
        elif self._writes and (row := _ROW.search(line)) is not None:
            self.transports.update(_LANE.findall(row[1]))
        elif "|" not in line and "+-" not in line:
            self._writes = False
