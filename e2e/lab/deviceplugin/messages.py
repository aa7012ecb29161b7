"""The messages of the kubelet's device-plug-in API, v1beta1, made at run time: no generated code, no compiler.

Field numbers are positions. A map field travels as a repeated message of key and value.
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "v1beta1"
FIELD = descriptor_pb2.FieldDescriptorProto
LAYOUT: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Empty": (),
    "DevicePluginOptions": (("pre_start_required", "bool"), ("get_preferred_allocation_available", "bool")),
    "RegisterRequest": (
        ("version", "string"),
        ("endpoint", "string"),
        ("resource_name", "string"),
        ("options", "DevicePluginOptions"),
    ),
    "Device": (("ID", "string"), ("health", "string")),
    "ListAndWatchResponse": (("devices", "repeated Device"),),
    "PreStartContainerRequest": (("devices_ids", "repeated string"),),
    "PreStartContainerResponse": (),
    "ContainerAllocateRequest": (("devices_ids", "repeated string"),),
    "AllocateRequest": (("container_requests", "repeated ContainerAllocateRequest"),),
    "EnvEntry": (("key", "string"), ("value", "string")),
    "ContainerAllocateResponse": (("envs", "repeated EnvEntry"),),
    "AllocateResponse": (("container_responses", "repeated ContainerAllocateResponse"),),
}
SCALARS = {"string": FIELD.TYPE_STRING, "bool": FIELD.TYPE_BOOL}


def _make_messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="deviceplugin.proto", package=PACKAGE, syntax="proto3")
    for name, fields in LAYOUT.items():
        message = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields, start=1):
            label = FIELD.LABEL_REPEATED if kind.startswith("repeated ") else FIELD.LABEL_OPTIONAL
            field = message.field.add(name=field_name, number=number, label=label)
            plain = kind.removeprefix("repeated ")
            if plain in SCALARS:
                field.type = SCALARS[plain]
            else:
                field.type, field.type_name = FIELD.TYPE_MESSAGE, f".{PACKAGE}.{plain}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in LAYOUT}


MESSAGES = _make_messages()
"""Name -> message class."""
