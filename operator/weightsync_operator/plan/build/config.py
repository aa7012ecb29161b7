"""The contract: what the runtime reads from $WEIGHTSYNC_CONFIG, in an immutable ConfigMap named by its hash. Pure.

The runtime validates it with `weightsync.config.Contract`; a test holds the two together.
"""

from __future__ import annotations

import json
from typing import Any

from weightsync_operator.api.names import Component
from weightsync_operator.api.spec import TransferSpec
from weightsync_operator.plan.build.auth import RUNTIME_USER
from weightsync_operator.plan.build.context import INFERENCE_PORT, Context, Manifest
from weightsync_operator.plan.build.pod import CA_FILE, SECRETS_FOLDER
from weightsync_operator.plan.hashing import digest

CONTRACT_VERSION = "1.3"
"""The newest that is written."""
_SECOND_CONTRACT_VERSION, _FIRST_CONTRACT_VERSION = "1.2", "1.1"
"""What a document says that has no newer key: a runtime refuses keys that it does not know, and a name is a hash of it all."""


def contract(ctx: Context) -> dict[str, Any]:
    """The document that every trainer rank and engine of the session reads."""
    transfer = ctx.spec.transfer
    return {
        "contract": _version(ctx),
        "session": ctx.session,
        "name": ctx.owner.name,
        "namespace": ctx.owner.namespace,
        "model": {"path": ctx.model_path, "dtype": ctx.spec.model.dtype},
        "redis": _redis(ctx),
        "modelExpress": {"address": ctx.model_express_address},
        "endpoint": {"port": INFERENCE_PORT, "tokenFile": f"{SECRETS_FOLDER}/endpoint-token"},
        "fabric": {
            "profile": ctx.profile.name,
            "transports": list(ctx.profile.transports),
            "revocation": ctx.profile.revocation.value,
        },
        "transfer": {
            "format": transfer.format,
            "commit": transfer.commit,
            "staging": transfer.staging,
            "stagingBudgetBytes": None if transfer.staging_budget_gib is None else transfer.staging_budget_gib << 30,
            "quorum": transfer.quorum,
            "verify": transfer.verify,
            "prefixCache": transfer.prefix_cache,
            "pauseMode": transfer.pause_mode,
            "timeoutSeconds": transfer.timeout_seconds,
            "maxVersionSkew": transfer.max_version_skew,
            **_arena(transfer),
        },
        **_telemetry(ctx),
    }


def _version(ctx: Context) -> str:
    """The first that has every key of the document.

    redis.tls and transfer.arenaBudgetBytes came with 1.2, transfer.zeroCopy with 1.3.
    """
    if ctx.spec.transfer.zero_copy:
        return CONTRACT_VERSION
    newer = ctx.spec.redis.speaks_tls or ctx.spec.transfer.arena_budget_gib is not None
    return _SECOND_CONTRACT_VERSION if newer else _FIRST_CONTRACT_VERSION


def _telemetry(ctx: Context) -> dict[str, Any]:
    """Only if something is asked for: the contract, and so its name, stays what it was for everybody else."""
    telemetry = ctx.spec.telemetry
    if telemetry is None:
        return {}
    asked = {"metricsPort": telemetry.metrics_port, "traceFolder": telemetry.trace_folder}
    return {"telemetry": {name: value for name, value in asked.items() if value is not None}}


def _arena(transfer: TransferSpec) -> dict[str, Any]:
    budget = {} if transfer.arena_budget_gib is None else {"arenaBudgetBytes": transfer.arena_budget_gib << 30}
    return budget | ({"zeroCopy": True} if transfer.zero_copy else {})


def _redis(ctx: Context) -> dict[str, Any]:
    external, (host, port) = ctx.spec.redis.external, ctx.redis_address
    return {
        "host": host,
        "port": port,
        "username": RUNTIME_USER if external is None else external.username,
        "passwordFile": f"{SECRETS_FOLDER}/redis-password",
        "database": 0 if external is None else external.database,
        **_tls(ctx),
    }


def _tls(ctx: Context) -> dict[str, Any]:
    redis = ctx.spec.redis
    if not redis.speaks_tls:
        return {}
    return {"tls": {"caFile": None if redis.ca is None else f"{SECRETS_FOLDER}/{CA_FILE}"}}


def config_map(ctx: Context) -> Manifest:
    """Immutable: a changed contract is another object, so that no pod sees its contract change under it."""
    document = contract(ctx)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": ctx.metadata(ctx.child(f"contract-{digest(document, 8)}"), Component.CONTRACT),
        "immutable": True,
        "data": {"contract.json": json.dumps(document, indent=2, sort_keys=True) + "\n"},
    }
