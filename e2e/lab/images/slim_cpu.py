"""Removes from a CPU environment what only a GPU run loads; run inside the image's build, standard library alone.

PyPI's torch is the CUDA build: its CUDA libraries are linked and have to stay. What they load later by name (engines of cuDNN,
cuSOLVER), Triton, video codecs, headers and static libraries are 1.9 GB that a CPU run never opens. A pattern that matches
nothing is an error: the packages have changed, and the list must be looked at again.
"""

import shutil
import sys
from pathlib import Path

UNUSED_ON_CPU = (
    "triton",
    "triton-*.dist-info",
    "nvidia/*/include",
    "nvidia/*/lib/*.a",
    "nvidia/*/lib/*.bc",
    "nvidia/cudnn/lib/libcudnn_engines_*",
    "nvidia/cudnn/lib/libcudnn_adv.*",
    "nvidia/cudnn/lib/libcudnn_heuristic.*",
    "nvidia/cudnn/lib/libcudnn_ops.*",
    "nvidia/cu13/lib/libcusolver*",
    "nvidia/cu13/lib/libnvrtc*.alt.*",
    "nvidia/cu13/lib/libnvperf_*",
    "torch/include",  # for C++ extensions and torch.compile, which need a compiler that the image has not
    "nixl_ep_cu12",
    "cv2",
    "opencv_python_headless.libs",
)


def slim(site_packages: Path) -> int:
    """Remove UNUSED_ON_CPU below `site_packages`; returns the bytes freed. Raises FileNotFoundError for a stale pattern."""
    freed_bytes = 0
    for pattern in UNUSED_ON_CPU:
        found = list(site_packages.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{pattern} matches nothing in {site_packages}: look at UNUSED_ON_CPU again")
        for path in found:
            files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
            freed_bytes += sum(each.lstat().st_size for each in files)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed_bytes


if __name__ == "__main__":
    print(f"freed {slim(Path(sys.argv[1])) / 1e6:.0f} MB")
