"""The cluster tests' trainer: SmolLM2 in FSDP2 shards, changed a little and pushed every few seconds, until ended or
as often as its second argument says.

It samples nothing, so that it is in the middle of a push whenever an engine keeps it waiting. Runs in the runtime image,
from a ConfigMap; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are the operator's.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from weightsync import Publisher

PAUSE_S = 3.0


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with Publisher.from_env(model) as publisher:
        step, pushes = 0, int(sys.argv[2]) if len(sys.argv) > 2 else None
        while pushes is None or step < pushes:
            report = publisher.push(step=step)
            print(json.dumps({"step": step, "version": report.version, "seconds": report.seconds}), flush=True)
            time.sleep(PAUSE_S)
            step += 1
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0 + 1e-3 * (-1) ** step)


if __name__ == "__main__":
    main()
