"""The contract: one JSON document that the operator renders and the runtime reads from $WEIGHTSYNC_CONFIG.

What differs from pod to pod (names, addresses, rank, epoch) is in the environment and read here too, in `PodFacts`; no other
module of the runtime reads the environment. Imports pydantic only.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.alias_generators import to_camel

from weightsync.errors import ConfigError

CONTRACT_VERSION = "1.3"
"""major.minor. A runtime refuses another major; unknown keys are an error within the same minor and ignored beyond it."""

Port = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class ModelSection(_Section):
    """The checkpoint that engines and trainer start from."""

    path: str
    """Folder with config.json and safetensors files, as mounted in the pods."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What engines compute in; an engine in another one does not join."""


class RedisTlsSection(_Section):
    """TLS to the ledger; its certificate must name the host."""

    ca_file: str | None = None
    """PEM of whom to trust besides the system's authorities, read at each connection."""


class RedisSection(_Section):
    """The ledger."""

    host: str
    port: Port = 6379
    username: str | None = None
    password_file: str | None = None
    database: Annotated[int, Field(ge=0, le=15)] = 0
    tls: RedisTlsSection | None = None
    """Plain when left out."""


class ModelExpressSection(_Section):
    """The rendezvous server."""

    address: str
    """host:port"""


class EndpointSection(_Section):
    """The plug-in's routes in each engine's API server."""

    port: Port = 8000
    token_file: str


class FabricSection(_Section):
    """What moves the bytes; the UCX variables themselves are in the pods' environment."""

    profile: str
    transports: tuple[str, ...]
    """UCX transports of which at least one must carry a push; any other is reported."""
    revocation: Literal["agent", "process"] = "process"
    """What ends a lost writer's access: destroying the receiver's agent (tcp between hosts), or the writer's death."""


class TransferSection(_Section):
    """How a push is made and ended."""

    format: Literal["auto", "bf16", "fp8-128x128", "fp8-128x128-ue8m0"] = "auto"
    """What engines must want; auto takes what they report. With `ue8m0` the scales are powers of two."""
    commit: Literal["inPlace", "staged"] = "inPlace"
    """Where bytes land: in live memory while the engine is paused, or in staging while it serves."""
    staging: Literal["none", "device", "pinnedHost"] = "none"
    staging_budget_bytes: Annotated[int, Field(gt=0)] | None = None
    """What staging may take in one engine rank; None for as much as its weights do."""
    arena_budget_bytes: Annotated[int, Field(gt=0)] | None = None
    """What the converted weights may take in one trainer rank, which then sends them through a ring of arenas and keeps none: late
    engines are caught up by their peers. None for all of them at once, kept for late engines. Needs commit staged."""
    zero_copy: bool = False
    """Whether weights that nothing converts are read where the trainer's model keeps them, instead of copied into an arena: then no
    version is kept for late engines, and a push returns only when nothing reads the model any more."""
    quorum: Annotated[int, Field(ge=1)] | None = None
    """Replicas without which nothing is committed; None for all that are alive when a push begins."""
    verify: Literal["full", "sampled", "off"] = "full"
    prefix_cache: Literal["reset", "keep"] = "reset"
    pause_mode: Literal["abort", "wait", "keep"] = "wait"
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """One absolute deadline of a push, from its first message to the decision."""
    max_version_skew: Annotated[int, Field(ge=0, le=1000)] = 0
    """Versions that an engine may be behind the committed one and still serve."""

    @model_validator(mode="after")
    def _staging_goes_with_staged(self) -> Self:
        if (self.commit == "staged") != (self.staging != "none"):
            raise ValueError(
                f"commit is {self.commit} and staging {self.staging}: staged needs device or pinnedHost, inPlace none"
            )
        return self

    @model_validator(mode="after")
    def _a_ring_goes_with_staged(self) -> Self:
        if self.arena_budget_bytes is not None and self.commit != "staged":
            raise ValueError(
                "arenaBudgetBytes needs commit staged: in place, all weights are converted before the first byte leaves, since an "
                "infinity found later would leave engines torn"
            )
        return self


class TelemetrySection(_Section):
    """What a trainer shows of its pushes besides the ledger."""

    metrics_port: Port | None = None
    """Each trainer rank serves Prometheus metrics at this port plus its local rank; not at all when left out."""
    trace_folder: str | None = None
    """The first trainer rank writes a trace of each push there, and keeps the last ones; not at all when left out."""


class Contract(_Section):
    """Everything that a trainer rank or an engine must know about the session it belongs to."""

    contract: Annotated[str, Field(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")] = CONTRACT_VERSION
    session: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,79}$")]
    name: str
    namespace: str = "default"
    model: ModelSection
    redis: RedisSection
    model_express: ModelExpressSection
    endpoint: EndpointSection
    fabric: FabricSection
    transfer: TransferSection = TransferSection()
    telemetry: TelemetrySection = TelemetrySection()

    @field_validator("contract")
    @classmethod
    def _same_major(cls, version: str) -> str:
        if version.split(".")[0] != CONTRACT_VERSION.split(".")[0]:
            raise ValueError(
                f"contract {version}, this runtime reads {CONTRACT_VERSION}: use images of one release for operator and pods"
            )
        return version

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the file that $WEIGHTSYNC_CONFIG names. Raises ConfigError with the field's path."""
        path = environ.get("WEIGHTSYNC_CONFIG")
        if path is None:
            raise ConfigError("WEIGHTSYNC_CONFIG is not set: it must name the contract file that the operator mounts")
        try:
            return cls.parse(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"WEIGHTSYNC_CONFIG={path}: {error.strerror}") from error

    @classmethod
    def parse(cls, text: str) -> Self:
        """Validate a contract document. Raises ConfigError naming each bad field.

        One of a later minor version may have keys that this runtime does not know; they are ignored.
        """
        try:
            return cls.model_validate_json(text, extra="ignore" if _is_later_minor(text) else "forbid")
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or '(document)'}: {e['msg']}" for e in error.errors()[:5]
            )
            raise ConfigError(f"contract has {error.error_count()} bad field(s): {faults}") from error

    def redis_password(self) -> str | None:
        return _read_secret(self.redis.password_file)

    def endpoint_token(self) -> str:
        token = _read_secret(self.endpoint.token_file)
        if not token:
            raise ConfigError(f"endpoint.tokenFile {self.endpoint.token_file} is empty")
        return token


def _is_later_minor(text: str) -> bool:
    """Whether a document says that it is of this major version and a later minor one; False for what is no such document."""
    try:
        major, minor = map(int, str(json.loads(text)["contract"]).split("."))
    except (ValueError, KeyError, TypeError):
        return False
    ours = tuple(map(int, CONTRACT_VERSION.split(".")))
    return major == ours[0] and minor > ours[1]


def _read_secret(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise ConfigError(f"secret file {path}: {error.strerror}") from error


class PodFacts(BaseModel):
    """What the downward API tells a process about its own pod; defaults serve plain processes."""

    model_config = ConfigDict(frozen=True)

    name: str
    uid: str
    ip: str
    epoch: int | None
    """The trainer's incarnation as the operator numbers it; None without an operator, and in engines."""
    local_rank: int = 0
    """Number of a trainer process within its pod."""

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Raises ConfigError if WEIGHTSYNC_EPOCH is set and not a positive integer."""
        epoch = environ.get("WEIGHTSYNC_EPOCH")
        if epoch is not None and not (epoch.isdigit() and int(epoch) > 0):
            raise ConfigError(f"WEIGHTSYNC_EPOCH={epoch!r}: must be a positive integer")
        return cls(
            name=environ.get("POD_NAME", f"process-{os.getpid()}"),
            uid=environ.get("POD_UID", f"host-{platform.node()}"),  # alike in all processes of an engine
            ip=environ.get("POD_IP", "127.0.0.1"),
            epoch=None if epoch is None else int(epoch),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
        )
