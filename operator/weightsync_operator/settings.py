"""The operator's own settings, from the environment that the chart renders. No other module of the operator reads it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from weightsync_operator.plan.build.context import Defaults
from weightsync_operator.plan.errors import OperatorError

KEY_LENGTH_BYTES = 32


class SettingsError(OperatorError):
    """The operator cannot start; the message names the variable and the cure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that differs from one installation to the next."""

    defaults: Defaults
    """Images for resources that name none."""
    operator_key: bytes = dataclasses.field(repr=False)
    """All passwords are derived from it: another key is another set of passwords, and a roll-out."""
    liveness_port: int = 8080
    """/healthz"""
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
        )
        return cls(
            defaults=defaults,
            operator_key=_read_key(_required(environ, "WEIGHTSYNC_OPERATOR_KEY_FILE")),
            liveness_port=_port(environ, "WEIGHTSYNC_LIVENESS_PORT", cls.liveness_port),
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
