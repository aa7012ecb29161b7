"""What each fabric profile makes of trainer and engine pods; `python -m tests.golden.fabrics` writes the files in fabrics/.

Only what a fabric decides is in them, so that they change when a fabric does and not otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.controlplane.builders import make_context
from weightsync_operator.plan.fabric import PROFILES
from weightsync_operator.plan.render import Render, render

FOLDER = Path(__file__).parent / "fabrics"

SPECS: dict[str, dict[str, Any]] = {
    **{name: {} for name in PROFILES},
    "ib": {"count": 8},
    "sriov": {"count": 2, "networks": ["rdma/vf-net"]},
    "roce": {"count": 2, "networks": ["rail-0", "rail-1"]},
    "gke": {"count": 4},
    "dra": {"count": 2},
}
"""spec.fabric of each golden file, beside the profile's name; trainers have four GPUs and engines two."""


def rendered_with(profile: str) -> Render:
    over = {"trainer": {"gpusPerNode": 4}, "inference": {"gpus": 2}, "fabric": {"profile": profile, **SPECS[profile]}}
    return render(make_context(**over))


def made(profile: str) -> dict[str, Any]:
    """The part of the children that depends on the profile."""
    rendered = rendered_with(profile)
    return {
        "transports": list(rendered.transports),
        "trainer": _pod(rendered.trainer),
        "engine": _pod(rendered.engines),
        "claimTemplates": {
            child["metadata"]["name"]: child["spec"]
            for child in rendered.base
            if child["kind"] == "ResourceClaimTemplate"
        },
    }


def _pod(owner: dict[str, Any]) -> dict[str, Any]:
    template = owner["spec"]["template"]
    (container,) = template["spec"]["containers"]
    annotations = template["metadata"]["annotations"]
    return {
        "annotations": {name: value for name, value in annotations.items() if not name.startswith("weightsync.dev/")},
        "env": {e["name"]: e["value"] for e in container["env"] if e["name"].startswith(("UCX_", "VLLM_CPU_"))},
        "resources": container["resources"],
        "resourceClaims": template["spec"].get("resourceClaims", []),
        "securityContext": container["securityContext"],
        "shm": next(volume["emptyDir"] for volume in template["spec"]["volumes"] if volume["name"] == "shm"),
    }


if __name__ == "__main__":
    for name in PROFILES:
        (FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(made(name), sort_keys=True, width=120))
