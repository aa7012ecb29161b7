"""What a native trainer may send: all of each parameter that it sends a part of."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from weightsync.errors import UnsupportedLayout
from weightsync.vllm.native import WeightSyncInitInfo
from weightsync.vllm.transfer import WeightSyncTransferEngine

ROWS, WIDTH = 4, 6
FUSED = ("q", "k", "v")


class Attention(nn.Module):
    """q, k and v are one parameter, as in vLLM's models."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(ROWS * len(FUSED), WIDTH, dtype=torch.bfloat16), requires_grad=False)
        self.o = nn.Parameter(torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            rows = self.o.data if name == "o" else self.qkv.data.narrow(0, ROWS * FUSED.index(name), ROWS)
            rows.copy_(tensor)


def layout_for(*names: str) -> list[str]:
    """Targets of the layout for a trainer that sends these."""
    engine = object.__new__(WeightSyncTransferEngine)  # vLLM's own part of it is not needed for this
    engine.model, engine._checkpoint = Attention(), {}
    sources = [[name, [ROWS, WIDTH]] for name in names]
    info = WeightSyncInitInfo(address="", port=0, token="", session="s", sources=sources, timeout_s=1.0)
    return [target.name for target in engine._layout(info).targets]


@pytest.mark.failure_mode(7)
def test_a_trainer_that_lacks_a_part_of_a_fused_parameter_is_refused_by_name() -> None:
    """Seen to fail where such a parameter was left out of the layout: a round then left a new `o` beside the old `qkv`."""
    assert layout_for("q", "k", "v", "o") == ["o", "qkv"]
    with pytest.raises(UnsupportedLayout, match=r"qkv .*elements"):
        layout_for("q", "k", "o")
