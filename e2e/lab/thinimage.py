"""An image archive that holds one layer and names the rest by digest, for a node that has the rest.

`docker save` always writes every layer; of the runtime image those are 5 GB, of which a change of the project touches 1 MB.
Imports the standard library and the lab's own modules.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from e2e.lab.errors import LabError

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
RUN_SETTINGS = ("User", "Env", "Entrypoint", "Cmd", "WorkingDir", "Labels", "StopSignal")


def digest_of(data: bytes) -> str:
    """A digest as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class ThinImage:
    """An image as (configuration of `docker image inspect`, layers of its base, one layer above)."""

    name: str
    """With registry, as containerd stores it: docker.io/weightsync/runtime:dev."""
    inspected: Mapping[str, Any]
    base_layers: tuple[str, ...]
    top_layer: str
    base_ref: str
    """Docker's name of the base alone, and below it that of the layer alone."""
    layer_ref: str

    def config(self) -> bytes:
        """The image's configuration; its digest is the image's id, and depends on nothing but the image."""
        settings = self.inspected["Config"]
        document = {
            "architecture": self.inspected["Architecture"],
            "os": self.inspected["Os"],
            "config": {key: settings[key] for key in RUN_SETTINGS if settings.get(key)},
            "rootfs": {"type": "layers", "diff_ids": [*self.base_layers, self.top_layer]},
        }
        return json.dumps(document, sort_keys=True).encode()

    @property
    def image_id(self) -> str:
        """What the node shows once it has the image."""
        return digest_of(self.config())

    def write_archive(self, out: IO[bytes], *, base_sizes_bytes: Mapping[str, int], layer: bytes) -> None:
        """Write an OCI archive with `layer` alone in it. Raises LabError when `layer` is not the top layer."""
        if digest_of(layer) != self.top_layer:
            raise LabError(
                f"the layer of {self.name} is {digest_of(layer)}, not {self.top_layer}", cure="build it again"
            )
        config = self.config()
        layers = [_descriptor(LAYER_TYPE, digest, base_sizes_bytes[digest]) for digest in self.base_layers]
        layers.append(_descriptor(LAYER_TYPE, self.top_layer, len(layer)))
        manifest = _document(
            mediaType=MANIFEST_TYPE, config=_descriptor(CONFIG_TYPE, digest_of(config), len(config)), layers=layers
        )
        described = _descriptor(MANIFEST_TYPE, digest_of(manifest), len(manifest))
        described["annotations"] = {"io.containerd.image.name": self.name}
        with tarfile.open(fileobj=out, mode="w") as archive:
            _add(archive, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
            _add(archive, "index.json", _document(manifests=[described]))
            for blob in (manifest, config, layer):
                _add(archive, f"blobs/sha256/{digest_of(blob).removeprefix('sha256:')}", blob)


def only_layer(saved: bytes) -> bytes:
    """The layer of a `docker save` archive of an image that has just one."""
    with tarfile.open(fileobj=io.BytesIO(saved)) as archive:
        manifest = _read(archive, "manifest.json")
        (name,) = json.loads(manifest)[0]["Layers"]
        return _read(archive, name)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise LabError(f"{name} in the saved image is no file", cure="report it with the version of Docker")
    return member.read()


def _document(**fields: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, **fields}, sort_keys=True).encode()


def _descriptor(media_type: str, digest: str, size_bytes: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size_bytes}


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def layers_of(inspected: Mapping[str, Any]) -> Sequence[str]:
    """The digests of an inspected image's uncompressed layers, lowest first."""
    return inspected["RootFS"]["Layers"]
