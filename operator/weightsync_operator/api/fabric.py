"""spec.fabric: what moves the bytes between trainer and engines. Imports pydantic only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from weightsync_operator.api.fields import DnsSubdomain, ResourceName, Section, later, rules

NetworkName = Annotated[
    str,
    Field(min_length=1, max_length=317, pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?/)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"),
]
"""name or namespace/name"""


class FabricSpec(Section):
    """What moves the bytes between trainer and engines."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.profile != 'tcp' || !has(self.resourceName)", "profile tcp uses no device: leave resourceName out"),
            (
                "!(self.profile in ['auto', 'gke', 'dra']) || !has(self.resourceName)",
                "profiles auto, gke and dra choose their devices themselves: leave resourceName out",
            ),
            (
                "self.profile != 'efa'",
                "profile efa needs NIXL's LIBFABRIC back end, which this runtime does not use; UCX on EFA falls to TCP "
                "silently: choose profile tcp and know it",
            ),
            (
                "self.profile in ['hca-shared', 'sriov', 'roce', 'gke'] || self.networks.size() == 0",
                "networks are attached with profiles hca-shared, sriov, roce and gke only",
            ),
            (
                "self.profile != 'sriov' || self.networks.size() > 0",
                "profile sriov needs networks: a virtual function comes with its network attachment",
            ),
            (
                "self.networks.size() == 0 || self.networks.size() == self.count || "
                "(self.networks.size() == 1 && self.profile != 'gke')",
                "networks names one network a device (count), or, except on gke, one network for all",
            ),
            ("self.profile == 'dra' || !has(self.deviceClass)", "deviceClass is for profile dra"),
        )
    )

    profile: Literal["auto", "tcp", "emulated", "hca-shared", "ib", "sriov", "roce", "efa", "gke", "dra"] = "tcp"
    """tcp: no device; hca-shared: RDMA shared device plug-in; ib: InfiniBand device plug-in; sriov: virtual functions; roce: RoCE
    device plug-in; gke: RDMA networks of GKE; dra: NICs and GPUs by resource claims; emulated: the lab's device plug-in, bytes over
    tcp. auto: chosen once from what the nodes offer, and kept. efa is refused: see docs/fabrics.md."""
    resource_name: ResourceName | None = None
    """Extended resource of the RDMA device; the profile's own by default."""
    count: Annotated[int, Field(ge=1, le=16)] = 1
    """RDMA devices a pod."""
    networks: Annotated[tuple[NetworkName, ...], Field(max_length=16)] = later(())
    """Networks that pods are attached to: NetworkAttachmentDefinitions of Multus, or with gke the names of GKE networks (rdma-0,
    rdma-1, ... up to count by default)."""
    device_class: DnsSubdomain | None = later(None)
    """DeviceClass of the NICs that resource claims ask for; dranet.net by default."""
    memlock: Literal["node", "rootWithIpcLock"] | None = later(None)
    """How a process may pin memory: by the node's own limit, or as root with IPC_LOCK (for a non-root pod the capability is not
    effective). The profile's own by default."""
    ucx: Annotated[
        dict[str, Annotated[str, Field(max_length=256)]],
        Field(
            max_length=32,
            json_schema_extra=rules(("self.all(k, k.matches('^UCX_[A-Z0-9_]+$'))", "ucx takes variables named UCX_*")),
        ),
    ] = Field(default_factory=dict)
    """UCX variables for trainer and engines, over the profile's."""
