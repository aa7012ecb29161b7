"""Passwords of one resource and the Secret that holds them. Pure: they are derived, so that two passes agree."""

from __future__ import annotations

import base64
import dataclasses
import hashlib

from weightsync_operator.api.names import Component
from weightsync_operator.plan.build.context import (
    REDIS_PORT,
    Manifest,
    Owner,
    owner_reference,
    selector_labels,
)
from weightsync_operator.plan.hashing import derive_password, digest

OPERATOR_USER = "operator"
RUNTIME_USER = "runtime"
MODEL_EXPRESS_USER = "mx"
PROBE_USER = "probe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passwords:
    """What the processes of one resource prove themselves with."""

    runtime: str = dataclasses.field(repr=False)
    model_express: str = dataclasses.field(repr=False)
    operator: str = dataclasses.field(repr=False)
    endpoint_token: str = dataclasses.field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Tells one set from another without giving it away."""
        return digest(dataclasses.astuple(self), 16)


def derive_passwords(operator_key: bytes, uid: str) -> Passwords:
    """All passwords of the resource `uid`."""
    return Passwords(
        runtime=derive_password(operator_key, uid, "redis/runtime"),
        model_express=derive_password(operator_key, uid, "redis/mx"),
        operator=derive_password(operator_key, uid, "redis/operator"),
        endpoint_token=derive_password(operator_key, uid, "endpoint"),
    )


def secret(owner: Owner, passwords: Passwords) -> Manifest:
    """The Secret <name>-auth. It is built afresh each time and never stored in a ControllerRevision."""
    redis = f"{owner.name}-redis:{REDIS_PORT}"
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": f"{owner.name}-auth",
            "namespace": owner.namespace,
            "labels": selector_labels(owner.name, Component.AUTH),
            "ownerReferences": [owner_reference(owner)],
        },
        "type": "Opaque",
        "data": {
            key: _base64(value)
            for key, value in {
                "redis-password": passwords.runtime,
                "endpoint-token": passwords.endpoint_token,
                "mx-redis-url": f"redis://{MODEL_EXPRESS_USER}:{passwords.model_express}@{redis}",
                "users.acl": access_list(passwords),
            }.items()
        },
    }


def access_list(passwords: Passwords) -> str:
    """Redis users by what they touch: the runtime its ledger, MX its own keys, the operator reads the ledger, the probe pings."""
    reading = "+get +mget +exists +hget +hgetall +hkeys +hlen +lrange +llen +time +ping"
    # What MX 0.7 needs to publish and list, found by trying.
    exchanging = (
        "+hset +hget +hgetall +hmget +hkeys +hlen +hdel +hexists +del +exists +scan +eval +evalsha +script|load +ping"
    )
    return "\n".join(
        (
            "user default off",
            f"user {RUNTIME_USER} on #{_sha256(passwords.runtime)} ~ws:* &ws:* +@all -@admin -@dangerous +info",
            f"user {MODEL_EXPRESS_USER} on #{_sha256(passwords.model_express)} ~mx:* {exchanging}",
            f"user {OPERATOR_USER} on #{_sha256(passwords.operator)} %R~ws:* {reading}",
            f"user {PROBE_USER} on nopass +ping",
            "",
        )
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
