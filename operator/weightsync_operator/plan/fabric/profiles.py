"""The profiles as data. A new one is a new entry; nothing else knows their names. Imports the standard library only."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FabricProfile:
    """What trainer and engine pods get."""

    name: str
    reason: str
    """Shown in status.fabric.reason."""
    resource_name: str | None
    """Extended resource of the RDMA device, limits = requests; None when there is none."""
    env: Mapping[str, str]
    """UCX and NIXL variables of trainer and engines."""
    engine_env: Mapping[str, str]
    """More variables of engines alone."""
    transports: tuple[str, ...]
    """UCX transports of which at least one must carry a push."""
    revocation: Revocation
    memlock: Memlock
    shm_size: str
    """Limit of the memory-backed /dev/shm; the node's default of 64 MiB is too small for UCX and for vLLM's own queues."""


_NOTHING: Mapping[str, str] = MappingProxyType({})

_TCP = FabricProfile(
    name="tcp",
    reason="spec.fabric.profile is tcp: bytes travel over the pod network",
    resource_name=None,
    # cuda_copy stages GPU memory for the wire; without a GPU UCX leaves it out by itself. One wire alone is proved by exclusion.
    env=MappingProxyType({"UCX_TLS": "tcp,self,cuda_copy"}),
    engine_env=_NOTHING,
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

_HCA_SHARED = FabricProfile(
    name="hca-shared",
    reason="spec.fabric.profile is hca-shared: RDMA devices of a shared device plug-in",
    resource_name="rdma/hca_shared_devices_a",
    # tcp is left out on purpose: a fabric that cannot be used must fail the push, not slow it down a hundredfold.
    env=MappingProxyType({"UCX_TLS": "rc_x,rc,dc_x,dc,cuda_copy,cuda_ipc"}),
    engine_env=_NOTHING,
    transports=("rc_mlx5", "rc_verbs", "dc_mlx5"),
    # Destroying the receiver's agent does not stop a remote RDMA write for certain; the writer's death does.
    revocation=Revocation.PROCESS,
    memlock=Memlock.ROOT_WITH_IPC_LOCK,
    shm_size="16Gi",
)

PROFILES: Mapping[str, FabricProfile] = MappingProxyType(
    {profile.name: profile for profile in (_TCP, _EMULATED, _HCA_SHARED)}
)
