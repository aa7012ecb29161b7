"""The ledger's connection: short socket timeouts, retries within a deadline, one error for everything Redis does wrong.

Imports redis and nothing of the session; the adapter that hides redis-py's exceptions from the rest of the runtime.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.connection import Connection
from redis.exceptions import AuthorizationError, NoPermissionError, OutOfMemoryError
from redis.retry import Retry

from weightsync.config import Contract, RedisTlsSection
from weightsync.errors import LedgerUnavailable
from weightsync.rendezvous.retry import retry_until

SOCKET_TIMEOUT_S = 0.8
"""Of one try. A push that ends without its ledger makes two after its deadline: the last wait's, and to say so."""
CLOCK_GOOD_S = 30.0
"""The difference between two clocks is measured again after so long, and after any fault: Redis may be on another host then."""
RETRY_PAUSE_S = 0.05
"""Between two tries; a refused connection answers at once and must not become a busy loop."""

T = TypeVar("T")

_bound: ContextVar[float] = ContextVar("weightsync-ledger-bound", default=math.inf)
"""No call of this context is tried again after that moment of time.monotonic()."""


class _Passing(Exception):
    """A fault that may be gone at the next try."""


class _Refused(Exception):
    """A fault that no retry cures."""


def _attempt(command: Callable[[redis.Redis], T], client: redis.Redis) -> T:
    """Run `command` once, with redis-py's errors told apart by what the caller does; a script's bug passes through."""
    try:
        return command(client)
    except (redis.AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise _Refused(str(error)) from error
    except (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, OutOfMemoryError, OSError) as error:
        raise _Passing(f"{type(error).__name__}: {error}") from error
    except redis.ResponseError as error:
        if str(error).startswith(("MISCONF", "NOREPLICAS")):
            raise _Passing(str(error)) from error
        raise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Witness:
    """What this process knows of the session; goes, in this order, into every script that changes the ledger."""

    epoch: int = 0
    version: int = 0
    """Committed in `epoch`; the greatest pair seen."""
    seen_epoch: int = 0
    published: int = 0
    attempt: int = 0

    def with_committed(self, epoch: int, version: int) -> Witness:
        """What is known after hearing that `version` was committed in `epoch`."""
        held_epoch, held = max((self.epoch, self.version), (epoch, version))
        return dataclasses.replace(
            self,
            epoch=held_epoch,
            version=held,
            seen_epoch=max(self.seen_epoch, epoch),
            published=max(self.published, version),
        )


class _Shared:
    """State of one client that its copies with other deadlines share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.witness = Witness()
        self.clock_offset_s: float | None = None
        self.clock_read_at = -math.inf
        self.connected = False
        self.last_fault = -math.inf

    def note_connect(self, connection: Connection) -> None:
        """redis-py makes a connection that the server closed anew without an error: it counts as a fault all the same.

        A Redis that came back empty between two calls would otherwise look like one in which every lease ran out.
        """
        connection.on_connect()
        with self.lock:
            if self.connected:
                self.last_fault = time.monotonic()
            self.connected = True


class LedgerConnection:
    """A thread-safe Redis client of one session. Every command is tried again until `retry_s` ran out."""

    def __init__(
        self,
        *,
        session: str,
        host: str,
        port: int,
        database: int = 0,
        username: str | None = None,
        password: str | None = None,
        tls: RedisTlsSection | None = None,
        retry_s: float = 5.0,
    ) -> None:
        self.session = session
        self.address = f"{host}:{port}/{database}"
        self._retry_s = retry_s
        self._until: float | None = None
        self._shared = _Shared()
        self._scripts: dict[str, Script] = {}
        self._client = redis.Redis(
            host=host,
            port=port,
            db=database,
            username=username,
            password=password,
            ssl=tls is not None,
            ssl_ca_certs=None if tls is None else tls.ca_file,
            ssl_check_hostname=True,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            socket_keepalive=True,
            health_check_interval=15,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
            redis_connect_func=cast(Any, self._shared.note_connect),  # given the connection, which its annotation omits
        )

    @classmethod
    def from_contract(cls, contract: Contract, *, retry_s: float = 5.0) -> Self:
        """Open the contract's ledger; nothing is sent yet. Raises ConfigError if the password file can't be read."""
        return cls(
            session=contract.session,
            host=contract.redis.host,
            port=contract.redis.port,
            database=contract.redis.database,
            username=contract.redis.username,
            password=contract.redis_password(),
            tls=contract.redis.tls,
            retry_s=retry_s,
        )

    def until(self, deadline: float) -> Self:
        """The same ledger, whose calls are retried until `deadline` (time.monotonic) instead of for `retry_s`."""
        other = copy.copy(self)
        other._until = deadline
        return other

    @staticmethod
    @contextmanager
    def bounded(deadline: float) -> Iterator[None]:
        """Whatever is called within, on this thread or one that asyncio lends it: no retry after `deadline` (time.monotonic)."""
        token = _bound.set(min(deadline, _bound.get()))
        try:
            yield
        finally:
            _bound.reset(token)

    def close(self) -> None:
        """Close the sockets; a later call would open new ones."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def calm_s(self) -> float:
        """Seconds since a call of this client last failed or had to connect again; infinite when none ever did.

        Leases of the living run out while the ledger is away, and none is renewed before its holder's next beat.
        """
        with self._shared.lock:
            return time.monotonic() - self._shared.last_fault

    @property
    def witness(self) -> Witness:
        """The most that this process knows to be committed, opened and tried."""
        with self._shared.lock:
            return self._shared.witness

    def _witness(self, change: Callable[[Witness], Witness]) -> None:
        with self._shared.lock:
            self._shared.witness = change(self._shared.witness)

    def _note_head(self, *, epoch: int, version: int, version_epoch: int, published: int) -> None:
        """The ledger's head is known to be at least this."""

        def change(known: Witness) -> Witness:
            seen = known.with_committed(version_epoch, version)
            return dataclasses.replace(
                seen, seen_epoch=max(seen.seen_epoch, epoch), published=max(seen.published, published)
            )

        self._witness(change)

    def _call(self, what: str, command: Callable[[redis.Redis], T]) -> T:
        """Run `command`, again on passing faults until the deadline. Raises LedgerUnavailable saying what failed."""
        started = time.monotonic()
        deadline = min(_bound.get(), started + self._retry_s if self._until is None else self._until)
        try:
            return retry_until(deadline, lambda: self._attempt(command), passing=(_Passing,), pause_s=RETRY_PAUSE_S)
        except _Refused as error:
            cure = "check redis.username and redis.passwordFile of the contract, and the user's ACL"
            raise LedgerUnavailable(f"ledger {self.address}: {what} was refused ({error}); {cure}") from error
        except _Passing as error:
            cure = "is Redis up, writable and reachable from here?"
            tried_s = time.monotonic() - started
            raise LedgerUnavailable(
                f"ledger {self.address}: {what} failed for {tried_s:.1f} s ({error}); {cure}"
            ) from error

    def _attempt(self, command: Callable[[redis.Redis], T]) -> T:
        try:
            return _attempt(command, self._client)
        except _Passing:
            with self._shared.lock:
                self._shared.last_fault = time.monotonic()
            raise

    def _run(self, what: str, script: str, *args: str | float) -> Any:
        """Run a script of `scripts` on this session's keys."""
        known = self._scripts.get(script)
        if known is None:  # redis-py digests a script's text when it registers it
            known = self._scripts[script] = self._client.register_script(script)
        return self._call(what, lambda client: known(keys=[f"ws:{self.session}:"], args=list(args), client=client))

    def _run_witnessed(self, what: str, script: str, *args: str | float) -> Any:
        """Run a script that begins by raising the head to what this process knows."""
        known = self.witness
        return self._run(what, script, *dataclasses.astuple(known), *args)

    def now(self) -> float:
        """Seconds since the Unix epoch by the ledger's clock, the one clock that deadlines are told in."""
        return self._read_clock()

    def _read_clock(self) -> float:
        sent = time.monotonic()
        seconds, microseconds = self._call("TIME", lambda client: client.time())
        now = int(seconds) + int(microseconds) / 1e6
        with self._shared.lock:
            # As if the answer had been given when the question left: a deadline is met early rather than late.
            self._shared.clock_offset_s, self._shared.clock_read_at = now - sent, sent
        return now

    def clock_of(self, moment: float) -> float:
        """A moment of time.monotonic() by the ledger's clock, as that was read last; by this process's clock if it never was."""
        with self._shared.lock:
            offset_s = self._shared.clock_offset_s
        return moment + (time.time() - time.monotonic() if offset_s is None else offset_s)

    def deadline_to_monotonic(self, deadline_at: float) -> float:
        """A deadline by the ledger's clock, as this process's time.monotonic(); early by at most one round trip.

        With the ledger unreachable the last clock difference counts; raises LedgerUnavailable if there is none.
        """
        known = self.known_moment(deadline_at)
        if known is not None:
            return known
        try:
            self._read_clock()
        except LedgerUnavailable:
            if self._shared.clock_offset_s is None:
                raise
        with self._shared.lock:
            offset_s = self._shared.clock_offset_s
        assert offset_s is not None  # read above, or by an earlier call
        return deadline_at - offset_s

    def known_moment(self, deadline_at: float) -> float | None:
        """As `deadline_to_monotonic`, where the ledger need not be asked; None where it must be."""
        with self._shared.lock:
            now, offset_s = time.monotonic(), self._shared.clock_offset_s
            age_s, calm_s = now - self._shared.clock_read_at, now - self._shared.last_fault
        if offset_s is None or not 0.0 <= age_s <= min(CLOCK_GOOD_S, calm_s):
            return None
        return deadline_at - offset_s
