"""Reads and derives what a resource's Redis is reached with. Secrets are read by name, each pass: nothing watches them."""

from __future__ import annotations

from weightsync_operator.api.rendezvous import ExternalRedis, SecretKey
from weightsync_operator.api.spec import WeightSyncSpec
from weightsync_operator.cluster import Cluster
from weightsync_operator.plan.build.auth import (
    EXTERNAL_CA_FIELD,
    MANAGED_TLS_FIELD,
    PASSWORD_FIELD,
    Credentials,
    certificate_fingerprint,
    derive_passwords,
    external_passwords,
    secret_value,
)
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.errors import SpecError


async def read_credentials(
    cluster: Cluster, resource: Manifest, spec: WeightSyncSpec, operator_key: bytes
) -> Credentials:
    """Of this resource. Raises SpecError by the field of a Secret that is not there, or lacks what it should hold."""
    namespace, redis = resource["metadata"]["namespace"], spec.redis
    derived = derive_passwords(operator_key, resource["metadata"]["uid"])
    if redis.external is not None:
        password, ca = await read_external(cluster, namespace, redis.external)
        return Credentials(passwords=external_passwords(derived, password), ca=ca)
    if redis.tls is None:
        return Credentials(passwords=derived)
    name = redis.tls.secret_ref.name
    found = await cluster.get("Secret", namespace, name)
    return Credentials(
        passwords=derived,
        ca=secret_value(found, SecretKey(name=name, key="ca.crt"), MANAGED_TLS_FIELD),
        certificate=certificate_fingerprint(found, name),
    )


async def read_external(cluster: Cluster, namespace: str, external: ExternalRedis) -> tuple[str, str | None]:
    """Password of an external Redis, and whom to trust to have signed its certificate; raises as above."""
    found = await cluster.get("Secret", namespace, external.secret_ref.name)
    password = secret_value(found, external.secret_ref, PASSWORD_FIELD)
    ca = None if external.tls is None else external.tls.ca_secret_ref
    if ca is None:
        return password, None
    return password, secret_value(await cluster.get("Secret", namespace, ca.name), ca, EXTERNAL_CA_FIELD)


async def ca_of_managed(cluster: Cluster, namespace: str, secret: str) -> str | None:
    """Whom a managed Redis with a certificate of this Secret is trusted by; None while the Secret does not say."""
    try:
        return secret_value(
            await cluster.get("Secret", namespace, secret), SecretKey(name=secret, key="ca.crt"), MANAGED_TLS_FIELD
        )
    except SpecError:
        return None
