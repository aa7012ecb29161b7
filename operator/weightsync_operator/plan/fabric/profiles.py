"""The profiles as data. A new one is a new entry; nothing else knows their names. Imports the standard library only.

Resource names, annotations and variables are those that the device plug-ins and clouds document; docs/fabrics.md has the table.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType


class Memlock(enum.StrEnum):
    """How a process may pin memory for registration."""

    NODE = "node"
    """The node's own limit suffices; the pod stays non-root without capabilities."""
    ROOT_WITH_IPC_LOCK = "rootWithIpcLock"
    """Root with IPC_LOCK: on a non-root pod the capability is not effective (measured), and registration fails."""


class Revocation(enum.StrEnum):
    """What ends a lost writer's access (the contract's fabric.revocation)."""

    AGENT = "agent"
    PROCESS = "process"


class Devices(enum.StrEnum):
    """How a pod asks for its NICs."""

    EXTENDED = "extended"
    """`count` of one extended resource."""
    GKE_NETWORKS = "gkeNetworks"
    """One extended resource a network, and an interface for each."""
    CLAIM = "claim"
    """A ResourceClaim for NICs and GPUs together, so that each GPU gets the NIC of its own PCIe root."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FabricProfile:
    """What trainer and engine pods get."""

    name: str
    reason: str
    """Shown in status.fabric.reason."""
    resource_name: str | None = None
    """Extended resource of the RDMA device, limits = requests; None when there is none."""
    devices: Devices = Devices.EXTENDED
    env: Mapping[str, str]
    """UCX and NIXL variables of trainer and engines."""
    engine_env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """More variables of engines alone."""
    transports: tuple[str, ...]
    """UCX transports of which at least one must carry a push."""
    revocation: Revocation
    memlock: Memlock
    shm_size: str
    """Limit of the memory-backed /dev/shm; the node's default of 64 MiB is too small for UCX and for vLLM's own queues."""


# tcp is left out on purpose: a fabric that cannot be used must fail the push, not slow it down a hundredfold.
_RDMA_TLS = "rc_x,rc,dc_x,dc,cuda_copy,cuda_ipc"
_ROCE_V2_GID = "3"
"""Index of the routable RoCE v2 address on the NICs of GKE and of llm-d's RoCE nodes; `ucx` sets another."""


def _rdma(
    name: str, reason: str, *, resource: str | None, devices: Devices = Devices.EXTENDED, **env: str
) -> FabricProfile:
    return FabricProfile(
        name=name,
        reason=f"spec.fabric.profile is {name}: {reason}",
        resource_name=resource,
        devices=devices,
        env=MappingProxyType({"UCX_TLS": _RDMA_TLS, **env}),
        transports=("rc_mlx5", "rc_verbs", "dc_mlx5"),
        # Destroying the receiver's agent does not stop a remote RDMA write for certain; the writer's death does.
        revocation=Revocation.PROCESS,
        memlock=Memlock.ROOT_WITH_IPC_LOCK,
        shm_size="16Gi",
    )


_TCP = FabricProfile(
    name="tcp",
    reason="spec.fabric.profile is tcp: bytes travel over the pod network",
    # cuda_copy stages GPU memory for the wire; without a GPU UCX leaves it out by itself. One wire alone is proved by exclusion.
    env=MappingProxyType({"UCX_TLS": "tcp,self,cuda_copy"}),
    transports=("tcp",),
    revocation=Revocation.AGENT,
    memlock=Memlock.NODE,
    shm_size="2Gi",
)

_EMULATED = FabricProfile(
    name="emulated",
    reason="spec.fabric.profile is emulated: devices of the lab's plug-in, bytes over tcp",
    resource_name="rdma/hca_shared_devices_a",
    env=MappingProxyType({"UCX_TLS": "tcp,self"}),
    engine_env=MappingProxyType(
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Prepacked weights are in no parameter that a push could write.
            # Engines of one node would otherwise bind their threads to the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    ),
    transports=("tcp",),
    revocation=Revocation.AGENT,
    memlock=Memlock.NODE,
    shm_size="1Gi",
)

_PROFILES = (
    _TCP,
    _EMULATED,
    _rdma("hca-shared", "RDMA devices of a shared device plug-in", resource="rdma/hca_shared_devices_a"),
    _rdma("ib", "InfiniBand devices of a device plug-in", resource="rdma/ib"),
    _rdma("sriov", "virtual functions with a network attachment each", resource="nvidia.com/hostdev"),
    _rdma("roce", "RoCE devices of a device plug-in", resource="rdma/roce_gdr", UCX_IB_GID_INDEX=_ROCE_V2_GID),
    _rdma("gke", "RDMA networks of GKE", resource=None, devices=Devices.GKE_NETWORKS, UCX_IB_GID_INDEX=_ROCE_V2_GID),
    _rdma("dra", "NICs and GPUs by resource claims, paired by PCIe root", resource=None, devices=Devices.CLAIM),
)

PROFILES: Mapping[str, FabricProfile] = MappingProxyType({profile.name: profile for profile in _PROFILES})
