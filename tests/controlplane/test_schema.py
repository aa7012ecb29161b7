"""The CRD and the reference page are generated from the models, and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest

from weightsync.config import TransferSection
from weightsync_operator.api.__main__ import crd_yaml
from weightsync_operator.api.crd import custom_resource_definition
from weightsync_operator.api.docs import api_reference
from weightsync_operator.api.names import Condition, Reason
from weightsync_operator.api.schema import structural_schema
from weightsync_operator.api.spec import TransferSpec

ROOT = Path(__file__).parents[2]


def _schema() -> dict[str, Any]:
    return custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def _nodes(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key], f"{path}[]")


@pytest.mark.failure_mode(44)
def test_the_charts_crd_is_the_generated_one() -> None:
    assert (ROOT / "charts/weightsync/files/crd.yaml").read_text() == crd_yaml()


def test_the_reference_page_is_the_generated_one() -> None:
    assert (ROOT / "docs/api.md").read_text() == api_reference()


def test_the_reference_page_names_every_condition_and_reason() -> None:
    page = api_reference()
    assert [name for name in (*Condition, *Reason) if f"`{name}`" not in page] == []


@pytest.mark.failure_mode(40)
def test_every_value_of_the_spec_is_bounded() -> None:
    """CEL is priced by the worst case, so that one unbounded string costs the whole CRD."""
    unbounded = []
    for path, node in _nodes(_schema()["properties"]["spec"], "spec"):
        bounds = {
            "string": "enum" in node or "maxLength" in node,
            "integer": "maximum" in node and "minimum" in node,
            "array": "maxItems" in node,
            "object": "properties" in node
            or "maxProperties" in node
            or node.get("x-kubernetes-preserve-unknown-fields"),
        }
        if not bounds.get(node.get("type", ""), True):
            unbounded.append(path)
    assert unbounded == []


@pytest.mark.failure_mode(40)
def test_no_rule_asks_whether_a_defaulted_field_is_there() -> None:
    """Defaults come before CEL: has() of such a field is always true."""
    blind = []
    for path, node in _nodes(_schema(), ""):
        defaulted = {name for name, child in node.get("properties", {}).items() if "default" in child}
        for rule in node.get("x-kubernetes-validations", []):
            blind += [(path, name) for name in defaulted if f"has(self.{name})" in rule["rule"]]
    assert blind == []


def test_a_status_has_no_defaults() -> None:
    defaulted = [path for path, node in _nodes(_schema()["properties"]["status"], "status") if "default" in node]
    assert defaulted == []


def test_every_field_is_described() -> None:
    missing = [path for path, node in _nodes(_schema(), "") if not path.endswith("[]") and "description" not in node]
    assert set(missing) <= {".apiVersion", ".kind", ".metadata", ".status.lastPush.phases[]"}


def test_a_union_that_kubernetes_cannot_hold_is_refused_when_generating() -> None:
    class Ambiguous(pydantic.BaseModel):
        value: int | Literal["all"]

    with pytest.raises(ValueError, match="no union of 2 types"):
        structural_schema(Ambiguous)


def test_transfer_has_the_defaults_of_the_runtimes_contract() -> None:
    ours, theirs = TransferSpec().model_dump(), TransferSection().model_dump()
    assert ours.pop("staging_budget_gib") is theirs.pop("staging_budget_bytes") is None
    assert theirs.pop("arena_budget_bytes") is None  # left out of a dump while it has its default
    assert theirs.pop("zero_copy") is False  # likewise
    assert ours == theirs
