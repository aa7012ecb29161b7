"""spec.redis and spec.modelExpress: made by the operator, or somebody else's. Imports pydantic only."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from weightsync_operator.api.fields import DnsSubdomain, HostAndPort, Image, Quantity, Resources, Section, later, rules

_PLAIN_RESOURCES = "self.resources.requests.size() == 0 && self.resources.limits.size() == 0"
"""has(self.resources) would be true always: defaults come before CEL."""


class SecretKey(Section):
    """One value of a Secret in the resource's namespace."""

    name: DnsSubdomain
    """Name of the Secret."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = "password"
    """Key of the value."""


class CaCertificate(SecretKey):
    """Certificate of the authority that signed a server's, as PEM."""

    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = "ca.crt"
    """Key of the certificate."""


class ExternalRedisTls(Section):
    """TLS to an external Redis: its certificate must name the host of the address, and be signed by somebody who is trusted."""

    ca_secret_ref: CaCertificate | None = None
    """Whom to trust besides the authorities that the images know. The operator reads it, and pods mount it."""


class ExternalRedis(Section):
    """A Redis that somebody else runs. Give each resource a database of its own: ModelExpress keys have no owner."""

    address: HostAndPort
    """host:port. Another one is another, empty ledger; keys at the old one are left."""
    database: Annotated[int, Field(ge=0, le=15)] = 0
    """Number of the database."""
    username: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^\S+$")] | None = None
    """User of the access list, who needs the commands in docs/security.md; the default user otherwise."""
    secret_ref: SecretKey
    """The user's password. The operator reads it, and pods mount it."""
    tls: ExternalRedisTls | None = later(None)
    """Speak TLS with it; `{}` is enough for a certificate of an authority that the images know. Plain by default."""


class Persistence(Section):
    """A volume for the ledger, so that it outlives the pod of Redis."""

    size: Quantity = "1Gi"
    """Of the volume; it can grow if its class allows it."""
    storage_class_name: DnsSubdomain | None = None
    """The cluster's default class by default."""


class TlsSecret(Section):
    """A Secret with `tls.crt`, `tls.key` and `ca.crt`, as cert-manager writes it."""

    name: DnsSubdomain
    """Name of the Secret, in the resource's namespace."""


class ManagedRedisTls(Section):
    """TLS of the managed Redis, which then speaks nothing else."""

    secret_ref: TlsSecret
    """Its certificate, for the DNS names `<name>-redis` and `<name>-redis.<namespace>.svc`. A renewed one restarts Redis alone."""


class RedisSpec(Section):
    """The Redis that holds the ledger of versions: managed, or external."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                f"!has(self.external) || (!has(self.image) && !has(self.persistence) && {_PLAIN_RESOURCES})",
                "image, resources and persistence are of the managed Redis: leave them out with external",
            ),
            (
                "!has(self.external) || !has(self.tls)",
                "redis.tls is the certificate of the managed Redis: with external say external.tls",
            ),
            (
                "has(self.external) == has(oldSelf.external)",
                "managed or external is decided once: the ledger does not move. Make another resource",
            ),
            (
                "has(self.persistence) == has(oldSelf.persistence)",
                "persistence is decided once: the ledger does not move. Make another resource",
            ),
        )
    )

    image: Image | None = None
    """The operator's default by default."""
    resources: Resources = Resources()
    """Requests and limits of the Redis container."""
    persistence: Persistence | None = later(None)
    """A volume of its own; without it the ledger lives as long as the pod of Redis, and engines bring it back."""
    tls: ManagedRedisTls | None = later(None)
    """Encrypt what goes to it and comes from it. Plain by default."""
    external: ExternalRedis | None = later(None)
    """Use this one instead of making one."""

    @property
    def speaks_tls(self) -> bool:
        return (self.tls if self.external is None else self.external.tls) is not None

    @property
    def ca(self) -> SecretKey | None:
        """Where the certificate is that its server is known by; None for the authorities that an image knows, and without TLS."""
        if self.external is not None:
            return None if self.external.tls is None else self.external.tls.ca_secret_ref
        return None if self.tls is None else SecretKey(name=self.tls.secret_ref.name, key="ca.crt")


class ExternalModelExpress(Section):
    """A ModelExpress server that somebody else runs; its Redis is its own affair."""

    address: HostAndPort
    """host:port of its gRPC service."""


class ModelExpressSpec(Section):
    """The ModelExpress server by which trainer and engines find each other: managed, or external."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                f"!has(self.external) || (!has(self.image) && {_PLAIN_RESOURCES})",
                "image and resources are of the managed ModelExpress: leave them out with external",
            ),
            (
                "has(self.external) == has(oldSelf.external)",
                "managed or external is decided once: sources do not move. Make another resource",
            ),
        )
    )

    image: Image | None = None
    """The operator's default by default."""
    resources: Resources = Resources()
    """Requests and limits of the server's container."""
    external: ExternalModelExpress | None = later(None)
    """Use this one instead of making one."""
