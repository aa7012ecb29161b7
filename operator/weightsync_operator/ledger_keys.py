"""Deletes a resource's keys from an external Redis, within a deadline. Imports redis and where ledgers are."""

from __future__ import annotations

import asyncio

from redis.exceptions import RedisError

from weightsync_operator.telemetry import Ledger

TIMEOUT_S = 10.0
KEYS_AT_ONCE = 500


async def clear_keys(ledger: Ledger, prefix: str) -> str:
    """Delete every key that begins with `prefix`. Returns why some may be left, empty when none is.

    SCAN, not KEYS: the server goes on serving others, and what was deleted before the deadline stays deleted.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await _clear(ledger, prefix)
    except (RedisError, OSError, TimeoutError) as error:
        why = str(error) or f"not done in {TIMEOUT_S:g} s"
        return f"keys {prefix}* at {ledger.host}:{ledger.port}/{ledger.database}: {why}"[:500]
    return ""


async def _clear(ledger: Ledger, prefix: str) -> None:
    async with ledger.client() as redis:
        cursor = None
        while cursor != 0:
            cursor, keys = await redis.scan(cursor=cursor or 0, match=f"{prefix}*", count=KEYS_AT_ONCE)
            if keys:
                await redis.unlink(*keys)
