"""The operator's own settings, from the environment that the chart renders. No other module of the operator reads it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from weightsync_operator import logs
from weightsync_operator.leadership import LeaseTerms
from weightsync_operator.plan.build.context import Defaults
from weightsync_operator.plan.errors import OperatorError

KEY_LENGTH_BYTES = 32
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
MIN_LEASE_S, MAX_LEASE_S = 5, 300


class SettingsError(OperatorError):
    """The operator cannot start; the message names the variable and the cure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that differs from one installation to the next."""

    defaults: Defaults
    """Images for resources that name none."""
    operator_key: bytes = dataclasses.field(repr=False)
    """All passwords are derived from it: another key is another set of passwords, and a roll-out."""
    port: int = 8080
    """/healthz, /readyz and /metrics"""
    namespaces: tuple[str, ...] = ()
    """Namespaces to serve with a Role in each; empty for all, with a ClusterRole."""
    log_format: str = logs.TEXT
    """text or json"""
    lease: LeaseTerms | None = None
    """The Lease by which one of several operators leads; None for the only one, outside a cluster."""
    ledger_address: str = "{name}-redis.{namespace}.svc:6379"
    """host:port of a resource's Redis as the operator reaches it; tests run outside the cluster and override it."""
    kubeconfig: str | None = None
    """Path of a kubeconfig; None inside a cluster."""

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Raises SettingsError naming the variable."""
        defaults = Defaults(
            runtime_image=_required(environ, "WEIGHTSYNC_IMAGE_RUNTIME"),
            redis_image=_required(environ, "WEIGHTSYNC_IMAGE_REDIS"),
            model_express_image=_required(environ, "WEIGHTSYNC_IMAGE_MODELEXPRESS"),
            pull_policy=environ.get("WEIGHTSYNC_IMAGE_PULL_POLICY", "IfNotPresent"),
            token_review=_flag(environ, "WEIGHTSYNC_TOKEN_REVIEW"),
        )
        return cls(
            defaults=defaults,
            operator_key=_read_key(_required(environ, "WEIGHTSYNC_OPERATOR_KEY_FILE")),
            port=_port(environ, "WEIGHTSYNC_PORT", cls.port),
            lease=_lease(environ),
            namespaces=_namespaces(environ),
            log_format=_log_format(environ),
            ledger_address=environ.get("WEIGHTSYNC_LEDGER_ADDRESS", cls.ledger_address),
            kubeconfig=environ.get("KUBECONFIG"),
        )


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise SettingsError(f"{name} is not set: the chart sets it; outside a cluster, export it")
    return value


def _port(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise SettingsError(f"{name}={text!r}: must be a port from 1 to 65535")
    return int(text)


def _flag(environ: Mapping[str, str], name: str) -> bool:
    text = environ.get(name, "false")
    if text not in ("true", "false"):
        raise SettingsError(f"{name}={text!r}: must be true or false")
    return text == "true"


def _namespaces(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Patterns would need the right to list namespaces, so names only."""
    names = tuple(name for name in environ.get("WEIGHTSYNC_NAMESPACES", "").split(",") if name)
    for name in names:
        if _NAMESPACE.fullmatch(name) is None:
            raise SettingsError(
                f"WEIGHTSYNC_NAMESPACES: {name!r} is no name of a namespace; write names with commas between"
            )
    return names


def _log_format(environ: Mapping[str, str]) -> str:
    text = environ.get("WEIGHTSYNC_LOG_FORMAT", logs.TEXT)
    if text not in logs.FORMATS:
        raise SettingsError(f"WEIGHTSYNC_LOG_FORMAT={text!r}: must be one of {', '.join(logs.FORMATS)}")
    return text


def _lease(environ: Mapping[str, str]) -> LeaseTerms | None:
    place = environ.get("WEIGHTSYNC_LEASE", "")
    if not place:
        return None
    namespace, _, name = place.partition("/")
    if not namespace or not name:
        raise SettingsError(f"WEIGHTSYNC_LEASE={place!r}: must be NAMESPACE/NAME of the Lease that the chart made")
    seconds = environ.get("WEIGHTSYNC_LEASE_SECONDS", "15")
    if not seconds.isdigit() or not MIN_LEASE_S <= int(seconds) <= MAX_LEASE_S:
        raise SettingsError(
            f"WEIGHTSYNC_LEASE_SECONDS={seconds!r}: must be whole seconds from {MIN_LEASE_S} to {MAX_LEASE_S}"
        )
    return LeaseTerms(namespace=namespace, name=name, duration_s=float(seconds))


def _read_key(path: str) -> bytes:
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"WEIGHTSYNC_OPERATOR_KEY_FILE={path}: {error.strerror}") from error
    if len(key) < KEY_LENGTH_BYTES:
        raise SettingsError(
            f"WEIGHTSYNC_OPERATOR_KEY_FILE={path} holds {len(key)} bytes: {KEY_LENGTH_BYTES} or more are needed"
        )
    return key
