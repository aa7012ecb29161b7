"""Arenas are taken outside expandable segments, and the allocator is left as it was; tests/gpu has the same on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weightsync import device_memory

USERS = "max_split_size_mb:512,expandable_segments:True,roundup_power2_divisions:[256:1,512:2]"


@pytest.mark.parametrize(
    ("settings", "environment", "told"),
    [
        ({"expandable_segments": False, "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "", []),
        (
            {"expandable_segments": True, "PYTORCH_CUDA_ALLOC_CONF": USERS},
            "max_split_size_mb:1",
            [USERS.replace("True", "False"), USERS],
        ),
        ({"expandable_segments": True}, USERS, [USERS.replace("True", "False"), USERS]),
        ({"expandable_segments": True}, "", ["expandable_segments:False", "expandable_segments:True"]),
        (
            {"expandable_segments": True, "PYTORCH_ALLOC_CONF": "max_split_size_mb:512"},
            "",
            ["max_split_size_mb:512,expandable_segments:False", "max_split_size_mb:512"],
        ),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_one_field_is_changed_for_one_allocation(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], environment: str, told: list[str], fails: bool
) -> None:
    """Torch resets what a configuration leaves out: with `expandable_segments:False` alone a user's max_split_size_mb was lost."""
    conf: list[str] = []
    during: list[list[str]] = []

    def empty(*_: Any, **__: Any) -> torch.Tensor:
        during.append(list(conf))
        if fails:
            raise torch.OutOfMemoryError
        return torch.zeros(1)

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", environment)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"allocator_settings": settings})
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", conf.append)
    monkeypatch.setattr(torch, "empty", empty)
    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            device_memory.allocate(8, torch.device("cuda"))
    else:
        device_memory.allocate(8, torch.device("cuda"))
    assert (during, conf) == ([told[:1]], told)
