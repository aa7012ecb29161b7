"""From pydantic's JSON schema to the structural schema that a CustomResourceDefinition accepts.

The API server refuses $ref, anyOf with null, and additionalProperties beside properties; this module rewrites them. It takes
part in generating the chart only, never in a running operator. Imports pydantic only.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_DROPPED = ("title", "$defs")


def structural_schema(model: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI v3 schema of `model`, self-contained. Raises ValueError for a union that a structural schema cannot hold."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(raw, raw.get("$defs", {}))


def without_defaults(schema: Any) -> Any:
    """The same schema with no default in it: a status holds what its writer wrote."""
    if isinstance(schema, list):
        return [without_defaults(member) for member in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: without_defaults(value) for key, value in schema.items() if key != "default"}


def _convert(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    node = _without_null(_resolve(node, definitions), definitions)
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key in _DROPPED or (key == "additionalProperties" and isinstance(value, bool)):
            continue
        if key == "default" and value is None:
            continue
        out[key] = _convert_value(key, value, definitions)
    if "default" in out:
        # CEL rules judge a default as it stands here, before the defaults of its own fields are filled in.
        out["default"] = _completed(_without_nulls(out["default"]), out)
    if "const" in out:
        out["enum"] = [out.pop("const")]
    return out


def _without_nulls(default: Any) -> Any:
    if not isinstance(default, dict):
        return default
    return {name: _without_nulls(value) for name, value in default.items() if value is not None}


def _completed(default: Any, schema: dict[str, Any]) -> Any:
    """A default with the defaults of the fields that it leaves out."""
    if not isinstance(default, dict):
        return default
    fields = schema.get("properties", {})
    ours = {name: _completed(value, fields.get(name, {})) for name, value in default.items()}
    theirs = {name: child["default"] for name, child in fields.items() if name not in default and "default" in child}
    return ours | theirs


def _convert_value(key: str, value: Any, definitions: dict[str, Any]) -> Any:
    if key == "properties":
        return {name: _convert(child, definitions) for name, child in value.items()}
    if key in ("items", "additionalProperties"):
        return _convert(value, definitions)
    return value


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Inline a $ref; what stands beside it (description, default) wins over the definition's own."""
    reference = node.get("$ref")
    if reference is None:
        return node
    beside = {key: value for key, value in node.items() if key != "$ref"}
    return {**_resolve(definitions[reference.rsplit("/", 1)[-1]], definitions), **beside}


def _without_null(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Optional fields are absent, never null: keep the other member of the union."""
    if "anyOf" not in node:
        return node
    members = [member for member in node["anyOf"] if member.get("type") != "null"]
    if len(members) != 1:
        raise ValueError(f"a structural schema holds no union of {len(members)} types: {node['anyOf']}")
    beside = {key: value for key, value in node.items() if key != "anyOf"}
    return {**_resolve(members[0], definitions), **beside}
