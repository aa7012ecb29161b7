"""Saves the sharded model as a Hugging Face checkpoint that any engine loads, and finds the last one again.

A checkpoint is complete under its name or absent: it is written beside and renamed. Optimizer state is not kept, so a resumed
run starts with fresh Adam moments. Imports torch and safetensors.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

KEPT = 2
"""The last one, and the one before it for whoever is still reading that."""
WEIGHTS = "model.safetensors"


def save(model: torch.nn.Module, *, step: int, folder: Path, base: Path) -> Path | None:
    """Write `folder/step-NNNNNN` in bf16, with the other files of the `base` checkpoint. All ranks call it, the first writes.

    Rounding to bf16 is what a push does too, so an engine that loads the folder holds what the live ones hold.
    """
    state = {name: _whole(parameter) for name, parameter in model.named_parameters()}
    if dist.get_rank() != 0:
        return None
    made = folder / f".step-{step:06d}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copyfile(file, made / file.name)
    save_file(state, made / WEIGHTS, metadata={"format": "pt"})
    final = folder / f"step-{step:06d}"
    shutil.rmtree(final, ignore_errors=True)
    made.rename(final)
    for old in _finished(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> tuple[int, Path] | None:
    """(step, folder) of the last complete checkpoint, or None."""
    found = _finished(folder)
    return (int(found[-1].name.removeprefix("step-")), found[-1]) if found else None


def _finished(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / WEIGHTS).is_file())


@torch.no_grad()
def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The whole parameter in bf16, on every rank; rounded before it is gathered, which halves the traffic."""
    rounded = parameter.detach().to(torch.bfloat16)
    return rounded.full_tensor() if isinstance(rounded, DTensor) else rounded
