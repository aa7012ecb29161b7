"""Emulated devices: registers extended resources with the real kubelet over its device-plug-in API (v1beta1).

RESOURCES="nvidia.com/gpu=8,rdma/hca_shared_devices_a=8" says what the node offers. A file in FAULTS named like a device
("gpu-3") makes that device Unhealthy until it is removed. Needs grpcio and protobuf alone; runs as a DaemonSet.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from messages import MESSAGES

PLUGIN_FOLDER = Path(os.environ.get("PLUGIN_FOLDER", "/var/lib/kubelet/device-plugins"))
FAULT_FOLDER = Path(os.environ.get("FAULTS", "/run/faults"))
POLL_S = 0.5
REGISTER_TIMEOUT_S = 10.0
KNOWN_VARIABLES = {"nvidia.com/gpu": "NVIDIA_VISIBLE_DEVICES"}


@dataclass(frozen=True)
class Resource:
    """An extended resource and how many devices of it the node has."""

    name: str
    count: int

    @property
    def device_ids(self) -> tuple[str, ...]:
        return tuple(f"{self.name.rsplit('/', 1)[-1]}-{index}" for index in range(self.count))

    @property
    def endpoint(self) -> str:
        """The plug-in's socket in the kubelet's folder."""
        return f"emulated-{self.name.replace('/', '_')}.sock"

    @property
    def variable(self) -> str:
        """The environment variable in which a container finds the devices it got."""
        plain = "".join(letter if letter.isalnum() else "_" for letter in self.name).upper()
        return KNOWN_VARIABLES.get(self.name, f"EMULATED_{plain}")


def parse_resources(text: str) -> tuple[Resource, ...]:
    """ "a/b=2,c/d=1" -> resources; ValueError names the part that is not NAME=COUNT."""
    resources = []
    for part in text.split(","):
        name, _, count = part.strip().partition("=")
        if not name or not count.isdigit():
            raise ValueError(f"RESOURCES has {part!r}, which is not NAME=COUNT")
        resources.append(Resource(name, int(count)))
    return tuple(resources)


class Faults:
    """Which devices are broken now; wakes those who wait when that changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed = threading.Condition()
        self._generation = 0
        self._broken: frozenset[str] = frozenset()

    def poll(self) -> None:
        """Read the folder again."""
        broken = frozenset(path.name for path in self._folder.iterdir()) if self._folder.is_dir() else frozenset()
        with self._changed:
            if broken != self._broken:
                self._broken, self._generation = broken, self._generation + 1
                self._changed.notify_all()

    def after(self, generation: int, timeout_s: float) -> tuple[int, frozenset[str]]:
        """Wait at most `timeout_s` for a newer generation; the current one and its broken devices."""
        with self._changed:
            self._changed.wait_for(lambda: self._generation != generation, timeout_s)
            return self._generation, self._broken


class Plugin(grpc.GenericRpcHandler):
    """The kubelet's DevicePlugin service for one resource."""

    def __init__(self, resource: Resource, faults: Faults) -> None:
        self._resource = resource
        self._faults = faults
        self._server: grpc.Server | None = None

    def service(self, handler_call_details: Any) -> Any:
        """grpc's dispatch: the last part of the method's path picks the handler."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "GetDevicePluginOptions": (unary, self._options, "Empty"),
            "ListAndWatch": (stream, self._watch, "Empty"),
            "Allocate": (unary, self._allocate, "AllocateRequest"),
            "PreStartContainer": (unary, self._pre_start, "PreStartContainerRequest"),
        }
        found = handlers.get(handler_call_details.method.rsplit("/", 1)[-1])
        if found is None:
            return None
        kind, behaviour, request = found
        return kind(behaviour, MESSAGES[request].FromString, lambda message: message.SerializeToString())

    def serve(self) -> None:
        """Listen on a fresh socket (a restarted kubelet has removed the old one) and register with the kubelet."""
        if self._server is not None:
            self._server.stop(None).wait()
        path = PLUGIN_FOLDER / self._resource.endpoint
        path.unlink(missing_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(f"unix://{path}")
        self._server.start()
        request = MESSAGES["RegisterRequest"](
            version="v1beta1", endpoint=self._resource.endpoint, resource_name=self._resource.name
        )
        with grpc.insecure_channel(f"unix://{PLUGIN_FOLDER / 'kubelet.sock'}") as channel:
            register = channel.unary_unary(
                "/v1beta1.Registration/Register",
                request_serializer=MESSAGES["RegisterRequest"].SerializeToString,
                response_deserializer=MESSAGES["Empty"].FromString,
            )
            register(request, timeout=REGISTER_TIMEOUT_S)
        print(f"registered {self._resource.name}={self._resource.count}", flush=True)

    def _options(self, request: Any, context: grpc.ServicerContext) -> Any:
        return MESSAGES["DevicePluginOptions"]()

    def _pre_start(self, request: Any, context: grpc.ServicerContext) -> Any:
        return MESSAGES["PreStartContainerResponse"]()

    def _watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        generation, broken = self._faults.after(-1, 0)
        while True:
            devices = [
                MESSAGES["Device"](ID=name, health="Unhealthy" if name in broken else "Healthy")
                for name in self._resource.device_ids
            ]
            yield MESSAGES["ListAndWatchResponse"](devices=devices)
            seen = generation
            while seen == generation:
                generation, broken = self._faults.after(seen, POLL_S)
                if not context.is_active():
                    return

    def _allocate(self, request: Any, context: grpc.ServicerContext) -> Any:
        answer = MESSAGES["AllocateResponse"]()
        for wanted in request.container_requests:
            devices = ",".join(sorted(wanted.devices_ids))
            print(f"allocated {devices}", flush=True)
            answer.container_responses.add().envs.add(key=self._resource.variable, value=devices)
        return answer


def kubelet_socket() -> tuple[int, int] | None:
    """What tells one kubelet's socket from the next: the inode is reused, so its change time counts too."""
    try:
        status = (PLUGIN_FOLDER / "kubelet.sock").stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def main() -> int:
    """Register, and again whenever the kubelet makes a new socket; ends only by a signal."""
    FAULT_FOLDER.mkdir(parents=True, exist_ok=True)
    faults = Faults(FAULT_FOLDER)
    plugins = [Plugin(resource, faults) for resource in parse_resources(os.environ["RESOURCES"])]
    registered_with: tuple[int, int] | None = None
    while True:
        faults.poll()
        socket = kubelet_socket()
        if socket is not None and socket != registered_with:
            try:
                for plugin in plugins:
                    plugin.serve()
                registered_with = socket
            except grpc.RpcError as error:
                print(f"the kubelet did not answer, trying again: {error}", flush=True)
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
