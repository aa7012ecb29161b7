"""Bounded field types and the base of the API's models.

Every string, integer, list and map of the resource has a bound: the API server prices CEL rules by them. Imports pydantic only.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel


class Section(BaseModel):
    """A frozen part of the resource: snake_case here, camelCase in YAML; docstrings under fields become descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True
    )


def later(default: Any, *, alias: str | None = None) -> Any:
    """Default of a field that came after the first release.

    A dump leaves the field out while it has its default: sessions and revisions are hashes of dumps, and a spec that does not
    name the field must keep its hash when the operator learns it.
    """
    return Field(default=default, alias=alias, exclude_if=lambda value: value == default)


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules for `json_schema_extra`, given as (rule, message)."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


Image = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^\S+$")]
Argument = Annotated[str, Field(max_length=4096)]
Arguments = Annotated[tuple[Argument, ...], Field(max_length=128)]
AbsolutePath = Annotated[str, Field(min_length=2, max_length=512, pattern=r"^/[^:]*$")]
DnsSubdomain = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
DnsLabel = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
_HOST = r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?)"
_PORT = r"([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
HostAndPort = Annotated[str, Field(min_length=3, max_length=262, pattern=rf"^{_HOST}:{_PORT}$")]
"""host:port; an IPv6 address stands in brackets."""
ResourceName = Annotated[
    str,
    Field(
        min_length=3,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
    ),
]
Quantity = Annotated[
    str | int,
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
            "maxLength": 32,
        }
    ),
]
Quantities = Annotated[dict[str, Quantity], Field(max_length=16)]


class Resources(Section):
    """Requests and limits of one container."""

    requests: Quantities = Field(default_factory=dict)
    """Replaces the small default requests."""
    limits: Quantities = Field(default_factory=dict)
    """None by default: a CPU limit slows a push down, and memory depends on the model."""


PodOverlay = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
"""A part of a PodTemplateSpec, laid over the rendered one."""
