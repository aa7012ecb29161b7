"""GRPO on SmolLM2-135M: sample from the live service, score, one optimizer step, push. The example to copy.

One process a rank, as torchrun or the operator starts them (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Of WeightSync it uses
`Publisher` only: make one from the sharded model, push before the first sample and after each optimizer step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import checkpoint
import torch
import torch.distributed as dist
from service import Completion, Service, ServiceUnavailable
from task import MAX_TOKENS, PROMPTS, messages, reward
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from weightsync import Publisher

Group = list[tuple[Completion, float]]
"""Answers to one prompt, with their rewards."""
RETRY_S = 1.0


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.patience_s))
    resumed = checkpoint.latest(options.checkpoint_dir)
    done, source = resumed if resumed is not None else (0, options.model)
    model = load_sharded(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    service = Service(options.inference_url)
    prompts = PROMPTS[dist.get_rank() :: dist.get_world_size()]
    hold(options.hold_file, options.patience_s)
    with Publisher.from_env(model) as publisher:
        report = publisher.push(step=done)
        tell(step=done, resumed=resumed is not None, push=dataclasses.asdict(report))
        for step in range(done + 1, options.steps + 1):
            times = [time.monotonic()]
            groups = sample(service, prompts, options)
            times.append(time.monotonic())
            learn(model, optimizer, groups)
            times.append(time.monotonic())
            sampled_version, report = report.version, publisher.push(step=step)
            times.append(time.monotonic())
            saved = None
            if step % options.checkpoint_every == 0 or step == options.steps:
                saved = checkpoint.save(model, step=step, folder=options.checkpoint_dir, base=options.model)
            time.sleep(max(0.0, times[0] + options.min_step_s - time.monotonic()))
            times.append(time.monotonic())
            line = scores(groups) | durations(times) | {"checkpoint": str(saved) if saved is not None else None}
            tell(step=step, sampled_version=sampled_version, push=dataclasses.asdict(report), **line)
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    env = os.environ.get
    parser = argparse.ArgumentParser(description="GRPO on SmolLM2-135M against a live service")
    parser.add_argument("--model", type=Path, default=Path(env("MODEL_PATH", "/models/smollm2")))
    parser.add_argument("--inference-url", default=env("WEIGHTSYNC_INFERENCE_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--checkpoint-dir", type=Path, default=Path(env("CHECKPOINT_DIR", "/data/checkpoints")))
    parser.add_argument("--checkpoint-every", type=int, default=5, help="steps; the last step is always saved")
    parser.add_argument("--steps", type=int, default=20, help="in all, those of earlier incarnations included")
    parser.add_argument("--samples", type=int, default=6, help="answers to each prompt")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--min-step-s", type=float, default=0.0, help="slow down to this, to watch or to disturb it")
    parser.add_argument("--patience-s", type=float, default=600.0, help="how long the service may be away")
    parser.add_argument(
        "--hold-file", type=Path, default=None, help="wait before the first push while this file exists"
    )
    return parser.parse_args()


def load_sharded(path: Path) -> torch.nn.Module:
    """The model with fp32 master weights, one FSDP2 unit a layer and one for the rest."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def hold(file: Path | None, patience_s: float) -> None:
    """Wait on all ranks while `file` exists, so that somebody can look at the untrained service first."""
    deadline = time.monotonic() + patience_s
    while agree(file is not None and file.exists()):
        if agree(time.monotonic() > deadline):
            raise TimeoutError(f"{file} still exists after {patience_s:.0f} s: remove it to begin")
        time.sleep(RETRY_S)


def agree(mine: bool) -> bool:
    """True on all ranks when it is true on any."""
    flag = torch.tensor(int(mine))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def sample(service: Service, prompts: tuple[str, ...], options: argparse.Namespace) -> list[Group]:
    """Scored answers to this rank's prompts; when the service is away for any rank, all ask again, up to a deadline."""
    deadline = time.monotonic() + options.patience_s
    while True:
        groups, fault = [], None
        try:
            groups = service.sample(
                [messages(prompt) for prompt in prompts], samples=options.samples, max_tokens=MAX_TOKENS, reward=reward
            )
        except ServiceUnavailable as error:
            fault = str(error)
        if not agree(fault is not None):
            return groups
        if agree(time.monotonic() > deadline):
            raise TimeoutError(f"no samples for {options.patience_s:.0f} s; last: {fault or 'failed on another rank'}")
        time.sleep(RETRY_S)


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, groups: list[Group]) -> None:
    """One on-policy policy-gradient step with group-relative advantages."""
    rows = [
        (answer, advantage) for group in groups for (answer, _), advantage in zip(group, advantages(group), strict=True)
    ]
    length = max(len(answer.prompt_ids) + len(answer.token_ids) for answer, _ in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)  # advantage at sampled tokens, 0 at prompt and padding
    for row, (answer, advantage) in enumerate(rows):
        ids = answer.prompt_ids + answer.token_ids
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, len(answer.prompt_ids) : len(ids)] = advantage
    sampled = torch.tensor(float(sum(len(answer.token_ids) for answer, _ in rows)))
    dist.all_reduce(sampled)
    first = min(len(answer.prompt_ids) for answer, _ in rows)  # logits before it are of no use
    logits = model(input_ids=tokens, logits_to_keep=length - first + 1).logits[:, :-1]
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, first:, None]).squeeze(-1)
    # FSDP averages gradients over ranks; the sum over all sampled tokens is meant.
    loss = -(weights[:, first:] * logprobs).sum() * dist.get_world_size() / sampled
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def advantages(group: Group) -> list[float]:
    """How much better each answer is than its group, in the group's standard deviations."""
    rewards = torch.tensor([value for _, value in group])
    return ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()


def scores(groups: list[Group]) -> dict[str, float]:
    """Mean and spread of the rewards that all ranks' samples got."""
    mine = torch.tensor([value for group in groups for _, value in group])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    rewards = torch.cat(everyone)
    return {"reward_mean": rewards.mean().item(), "reward_std": rewards.std().item(), "samples": len(rewards)}


def durations(times: list[float]) -> dict[str, float]:
    """Seconds of a step's parts, from the moments between them."""
    parts = zip(("sample_s", "learn_s", "push_s", "save_s"), times, times[1:], strict=False)
    return {name: round(stop - start, 3) for name, start, stop in parts} | {"step_s": round(times[-1] - times[0], 3)}


def tell(**line: object) -> None:
    """One JSON line, from rank 0."""
    if dist.get_rank() == 0:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
