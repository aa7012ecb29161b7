"""The contract: what the runtime reads from $WEIGHTSYNC_CONFIG, in an immutable ConfigMap named by its hash. Pure.

The runtime validates it with `weightsync.config.Contract`; a test holds the two together.
"""

from __future__ import annotations

import json
from typing import Any

from weightsync_operator.api.names import Component
from weightsync_operator.plan.build.auth import RUNTIME_USER
from weightsync_operator.plan.build.context import INFERENCE_PORT, MODEL_EXPRESS_PORT, REDIS_PORT, Context, Manifest
from weightsync_operator.plan.build.pod import SECRETS_FOLDER
from weightsync_operator.plan.hashing import digest

CONTRACT_VERSION = "1.1"


def contract(ctx: Context) -> dict[str, Any]:
    """The document that every trainer rank and engine of the session reads."""
    transfer = ctx.spec.transfer
    return {
        "contract": CONTRACT_VERSION,
        "session": ctx.session,
        "name": ctx.owner.name,
        "namespace": ctx.owner.namespace,
        "model": {"path": ctx.model_path, "dtype": "bfloat16"},
        "redis": {
            "host": ctx.child("redis"),
            "port": REDIS_PORT,
            "username": RUNTIME_USER,
            "passwordFile": f"{SECRETS_FOLDER}/redis-password",
            "database": 0,
        },
        "modelExpress": {"address": f"{ctx.child('mx')}:{MODEL_EXPRESS_PORT}"},
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
        },
    }


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
