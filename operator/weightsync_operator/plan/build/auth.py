"""Passwords of one resource and the Secret that holds them. Pure: they are derived, so that two passes agree."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from typing import Any
from urllib.parse import quote

from weightsync_operator.api.names import Component
from weightsync_operator.api.rendezvous import ExternalRedis, RedisSpec, SecretKey
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.plan.build.context import (
    REDIS_PORT,
    Manifest,
    Owner,
    owner_reference,
    selector_labels,
    split_address,
)
from weightsync_operator.plan.errors import SpecError
from weightsync_operator.plan.hashing import derive_password, digest

PASSWORD_FIELD = "spec.redis.external.secretRef"
EXTERNAL_CA_FIELD = "spec.redis.external.tls.caSecretRef"
MANAGED_TLS_FIELD = "spec.redis.tls.secretRef"

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
    """What the operator derives and reads to make a resource's children, and to reach its Redis itself."""

    passwords: Passwords
    ca: str | None = None
    """PEM of whom it trusts to have signed the certificate of a Redis that speaks TLS; None for those that its image knows."""
    certificate: str = ""
    """Fingerprint of what a managed Redis proves itself with; empty when it speaks no TLS."""


def derive_passwords(operator_key: bytes, uid: str) -> Passwords:
    """All passwords of the resource `uid`."""
    return Passwords(
        runtime=derive_password(operator_key, uid, "redis/runtime"),
        model_express=derive_password(operator_key, uid, "redis/mx"),
        operator=derive_password(operator_key, uid, "redis/operator"),
        endpoint_token=derive_password(operator_key, uid, "endpoint"),
    )


def external_passwords(derived: Passwords, password: str) -> Passwords:
    """All users of an external Redis are one; a changed password changes the fingerprint, and so reaches the pods."""
    return dataclasses.replace(derived, runtime=password, model_express=password, operator=password)


def external_access(external: ExternalRedis) -> dict[str, Any]:
    """Host, port, username and database of an external Redis, and whether it speaks TLS."""
    host, port = split_address(external.address)
    user = {"username": external.username, "database": external.database}
    return {"host": host, "port": port, **user, "tls": external.tls is not None}


def certificate_fingerprint(found: Manifest | None, name: str) -> str:
    """Tells one key pair of the managed Redis from another. Raises SpecError if the Secret `found` holds none."""
    pair = SecretKey(name=name, key="tls.crt"), SecretKey(name=name, key="tls.key")
    return digest([secret_value(found, reference, MANAGED_TLS_FIELD) for reference in pair], 16)


def secret_value(found: Manifest | None, reference: SecretKey, field: str) -> str:
    """What the Secret `found` holds at the key of `reference`, which is at `field`. Raises SpecError if it is not there."""
    if found is None:
        raise SpecError(field, f"Secret {reference.name} is not in this namespace: create it, with key {reference.key}")
    encoded = (found.get("data") or {}).get(reference.key)
    if encoded is None:
        raise SpecError(
            field, f"Secret {reference.name} has no key {reference.key}: add it, or name another in secretRef"
        )
    try:
        return base64.b64decode(encoded).decode().strip()  # as the runtime reads it: files end with a newline
    except UnicodeDecodeError as error:
        raise SpecError(field, f"key {reference.key} of Secret {reference.name} is no text") from error


def secret_name(resource: str) -> str:
    """Of the Secret that the operator makes for a resource."""
    return f"{resource}-auth"


def secret(owner: Owner, passwords: Passwords, spec: WeightSyncSpec) -> Manifest:
    """The Secret <name>-auth. It is built afresh each time and never stored in a ControllerRevision.

    The password of an external Redis stays in the user's own Secret, which pods mount; a managed ModelExpress takes it in an URL.
    """
    data, external = {"endpoint-token": passwords.endpoint_token}, spec.redis.external
    if external is None:
        data |= {"redis-password": passwords.runtime, "users.acl": access_list(passwords)}
    if spec.model_express.external is None:
        data["mx-redis-url"] = _redis_url(owner, passwords.model_express, spec.redis)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": secret_name(owner.name),
            "namespace": owner.namespace,
            "labels": selector_labels(owner.name, Component.AUTH),
            "ownerReferences": [owner_reference(owner)],
        },
        "type": "Opaque",
        "data": {key: _base64(value) for key, value in data.items()},
    }


def _redis_url(owner: Owner, password: str, redis: RedisSpec) -> str:
    """User and password escaped: a slash or an at sign in one would end the URL's authority.

    Plain also where Redis speaks TLS: ModelExpress cannot, and asks the forwarder in its own pod.
    """
    external, forwarder = redis.external, f"127.0.0.1:{REDIS_PORT}"
    if external is None:
        address = forwarder if redis.speaks_tls else f"{owner.name}-redis:{REDIS_PORT}"
        return f"redis://{MODEL_EXPRESS_USER}:{password}@{address}"
    user, address = quote(external.username or "", safe=""), forwarder if redis.speaks_tls else external.address
    url = f"redis://{user}:{quote(password, safe='')}@{address}"
    return f"{url}/{external.database}" if external.database else url


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
