"""Run by test_shards_gloo in one process a rank: `python -m tests.dataplane.gloo_ranks FOLDER`, with torch.distributed's variables.

For each case shards a Qwen3-MoE, takes an optimizer step, and leaves in FOLDER what the rank's pieces hold; rank 0 also leaves what
torch gathers of each parameter by its own collectives.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from tests.dataplane.family_makers import build
from tests.dataplane.rank_makers import Parallelize, ep_fsdp, fsdp, mesh_of, sources_of_model

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
CASES: Mapping[str, Parallelize] = {
    "fsdp, offloaded": lambda model: fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "hsdp 2x2, fp32 masters": lambda model: fsdp(model, mesh_of(2, 2, names=["r", "s"]), mp_policy=HALF),
    "ep 2 x fsdp 2": ep_fsdp,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number, (case, parallelize) in enumerate(CASES.items()):
        model = build("qwen3_moe", num_experts=4)
        parallelize(model)
        local = sources_of_model(model)
        train_a_step(model, with_forward=parallelize is not ep_fsdp)
        held = [(piece.name, piece.start, piece.stop, piece.flat().clone()) for piece in local.pieces]
        torch.save((local.layout(dist.get_rank()).to_bytes(), held), folder / f"{number}-rank-{dist.get_rank()}.pt")
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        if dist.get_rank() == 0:
            torch.save({name: tensor.detach() for name, tensor in whole.items()}, folder / f"{number}-gathered.pt")
        print("done:", case, flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads of a mesh's groups may abort the interpreter while it is torn down


def train_a_step(model: torch.nn.Module, *, with_forward: bool) -> None:
    """Change every weight, by real gradients where the module runs as it is sharded, else by gradients that count ranks alike."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    if with_forward:
        tokens = torch.arange(24).reshape(2, 12)
        model(input_ids=tokens, labels=tokens).loss.backward()
    else:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
