"""The example's learning step and checkpoints, in one process on a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples.smollm2 import checkpoint, train
from examples.smollm2.service import Completion


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model(gloo: None) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def completion(prompt: list[int], tokens: list[int]) -> Completion:
    return Completion(tuple(prompt), tuple(tokens), "")


def logprob(model: torch.nn.Module, answer: Completion) -> float:
    """Sum of the log probabilities of an answer's tokens, computed without padding or slicing."""
    ids = torch.tensor([answer.prompt_ids + answer.token_ids])
    logits = model(input_ids=ids).logits
    loss = logits.sum() * 0  # FSDP reshards after a backward pass
    loss.backward()
    logprobs = torch.log_softmax(logits.detach()[0, :-1], dim=-1).gather(-1, ids[0, 1:, None])
    return logprobs[len(answer.prompt_ids) - 1 :].sum().item()


def test_a_step_makes_the_better_answer_likelier_and_the_worse_one_less_likely(model: torch.nn.Module):
    groups = [
        [(completion([1, 2, 3], [4, 5]), 1.0), (completion([1, 2, 3], [6, 7, 8]), 0.0)],
        [(completion([9, 3], [10]), 0.0), (completion([9, 3], [11, 12]), 1.0)],
    ]
    before = [[logprob(model, answer) for answer, _ in group] for group in groups]
    train.learn(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), groups)
    after = [[logprob(model, answer) for answer, _ in group] for group in groups]
    assert after[0][0] > before[0][0] and after[0][1] < before[0][1]
    assert after[1][0] < before[1][0] and after[1][1] > before[1][1]


def test_a_group_of_equal_rewards_changes_no_weight(model: torch.nn.Module):
    group = [(completion([1, 2], [3, 4]), 0.5), (completion([1, 2], [5]), 0.5)]
    before = [whole(parameter).clone() for parameter in model.parameters()]
    train.learn(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), [group])
    assert all(torch.equal(was, whole(now)) for was, now in zip(before, model.parameters(), strict=True))


def test_advantages_are_relative_to_the_group():
    group = [(completion([1], [2]), value) for value in (0.0, 0.5, 1.0)]
    assert train.advantages(group) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-3)


def test_a_checkpoint_holds_the_rounded_weights_and_the_bases_other_files(model: torch.nn.Module, tmp_path: Path):
    base = make_base(tmp_path)
    saved = checkpoint.save(model, step=7, folder=tmp_path / "out", base=base)
    assert saved is not None and saved == tmp_path / "out" / "step-000007"
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    weights = load_file(saved / "model.safetensors")
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], whole(p).bfloat16()) for name, p in model.named_parameters())


def test_only_the_last_checkpoints_stay_and_a_torn_one_is_not_found(model: torch.nn.Module, tmp_path: Path):
    base, out = make_base(tmp_path), tmp_path / "out"
    for step in (5, 10, 15):
        checkpoint.save(model, step=step, folder=out, base=base)
    (out / "step-000020").mkdir()
    (out / ".step-000025").mkdir()
    assert checkpoint.latest(out) == (15, out / "step-000015")
    assert not (out / "step-000005").exists()


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def test_durations_name_the_parts_between_moments():
    assert train.durations([1.0, 2.5, 4.5, 5.0, 5.25]) == {
        "sample_s": 1.5,
        "learn_s": 2.0,
        "push_s": 0.5,
        "save_s": 0.25,
        "step_s": 4.25,
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()


def make_base(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "tokenizer.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"old weights")
    return base
