"""The emulated device plug-in against a kubelet of the test: the real protocol over real sockets."""

import os
import queue
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from e2e.lab.paths import LAB_SOURCES

SOURCES = LAB_SOURCES / "deviceplugin"
WAIT_S = 20.0


@pytest.fixture(scope="module")
def messages() -> Any:
    """The plug-in's messages by name."""
    return runpy.run_path(str(SOURCES / "messages.py"))["MESSAGES"]


class Kubelet(grpc.GenericRpcHandler):
    """The registration half of a kubelet, on a socket that can be made anew."""

    def __init__(self, folder: Path, messages: Any) -> None:
        self.registered: queue.Queue[tuple[str, str]] = queue.Queue()
        self._folder, self._messages = folder, messages
        self._server: grpc.Server | None = None

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            self._register,
            request_deserializer=self._messages["RegisterRequest"].FromString,
            response_serializer=self._messages["Empty"].SerializeToString,
        )

    def _register(self, request: Any, context: grpc.ServicerContext) -> Any:
        assert request.version == "v1beta1"
        self.registered.put((request.resource_name, request.endpoint))
        return self._messages["Empty"]()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(f"unix://{self._folder / 'kubelet.sock'}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
        (self._folder / "kubelet.sock").unlink(missing_ok=True)


@pytest.fixture
def kubelet(tmp_path: Path, messages: Any) -> Iterator[Kubelet]:
    kubelet = Kubelet(tmp_path, messages)
    kubelet.start()
    yield kubelet
    kubelet.stop()


@pytest.fixture
def plugin(tmp_path: Path, kubelet: Kubelet) -> Iterator[Path]:
    """A running plug-in with three devices; the folder of its faults."""
    environment = {
        **os.environ,
        "RESOURCES": "nvidia.com/gpu=2,rdma/hca_shared_devices_a=1",
        "PLUGIN_FOLDER": str(tmp_path),
        "FAULTS": str(tmp_path / "faults"),
    }
    process = subprocess.Popen([sys.executable, str(SOURCES / "plugin.py")], env=environment, stdout=subprocess.PIPE)
    yield tmp_path / "faults"
    process.kill()
    process.communicate()


def endpoints(kubelet: Kubelet) -> dict[str, str]:
    """Resource -> socket of the next two registrations."""
    return dict(kubelet.registered.get(timeout=WAIT_S) for _ in range(2))


class Watch:
    """The device lists that the plug-in streams, one by one."""

    def __init__(self, channel: grpc.Channel, messages: Any) -> None:
        self._lists: queue.Queue[dict[str, str]] = queue.Queue()
        self._call = channel.unary_stream(
            "/v1beta1.DevicePlugin/ListAndWatch",
            request_serializer=messages["Empty"].SerializeToString,
            response_deserializer=messages["ListAndWatchResponse"].FromString,
        )(messages["Empty"]())
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for answer in self._call:
                self._lists.put({device.ID: device.health for device in answer.devices})
        except grpc.RpcError:
            return  # the test closed the channel

    def next(self) -> dict[str, str]:
        return self._lists.get(timeout=WAIT_S)


def test_offers_its_devices_and_tells_a_container_which_it_got(
    kubelet: Kubelet, plugin: Path, messages: Any, tmp_path: Path
) -> None:
    found = endpoints(kubelet)
    assert set(found) == {"nvidia.com/gpu", "rdma/hca_shared_devices_a"}
    with grpc.insecure_channel(f"unix://{tmp_path / found['nvidia.com/gpu']}") as channel:
        assert Watch(channel, messages).next() == {"gpu-0": "Healthy", "gpu-1": "Healthy"}
        allocate = channel.unary_unary(
            "/v1beta1.DevicePlugin/Allocate",
            request_serializer=messages["AllocateRequest"].SerializeToString,
            response_deserializer=messages["AllocateResponse"].FromString,
        )
        request = messages["AllocateRequest"]()
        request.container_requests.add(devices_ids=["gpu-1", "gpu-0"])
        (container,) = allocate(request, timeout=WAIT_S).container_responses
        assert [(each.key, each.value) for each in container.envs] == [("NVIDIA_VISIBLE_DEVICES", "gpu-0,gpu-1")]


def test_a_device_is_unhealthy_while_its_fault_is_there(
    kubelet: Kubelet, plugin: Path, messages: Any, tmp_path: Path
) -> None:
    found = endpoints(kubelet)
    with grpc.insecure_channel(f"unix://{tmp_path / found['nvidia.com/gpu']}") as channel:
        watch = Watch(channel, messages)
        assert set(watch.next().values()) == {"Healthy"}
        (plugin / "gpu-1").touch()
        assert watch.next() == {"gpu-0": "Healthy", "gpu-1": "Unhealthy"}
        (plugin / "gpu-1").unlink()
        assert watch.next() == {"gpu-0": "Healthy", "gpu-1": "Healthy"}


@pytest.mark.failure_mode(70)
def test_registers_again_with_a_kubelet_that_came_back(kubelet: Kubelet, plugin: Path) -> None:
    first = endpoints(kubelet)
    kubelet.stop()
    kubelet.start()
    assert endpoints(kubelet) == first
