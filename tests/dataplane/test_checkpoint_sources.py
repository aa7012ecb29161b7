"""A checkpoint that is pushed without a trainer arrives as an engine would have loaded it; the newest whole one is found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.dataplane.family_makers import build, saved
from tests.dataplane.slot_makers import deliver, engine, fill_all, same
from weightsync.checkpoint import newest_checkpoint, sources_of_checkpoint
from weightsync.errors import ConfigError
from weightsync.layout.records import SourceTensor


@pytest.mark.failure_mode(9)
def test_what_a_checkpoint_stores_in_fp32_is_sent_unrounded(tmp_path: Path) -> None:
    """An engine whose router is fp32: the weight is stored in bf16, the bias in fp32.

    Announced in one dtype for all, the bias arrives rounded to bf16: seen to fail with `dtype=None` taken out.
    """
    stored = saved(build("glm4_moe"), tmp_path)
    router = {name: tensor for name, tensor in stored.items() if ".mlp.gate." in name}
    assert {tensor.dtype for tensor in router.values()} == {torch.bfloat16, torch.float32}
    wanted = engine(
        [
            SourceTensor(name, tuple(tensor.shape), "float32" if name in router else "bfloat16")
            for name, tensor in stored.items()
        ]
    )
    memory = deliver(fill_all([sources_of_checkpoint(tmp_path)], wanted), wanted)
    for name, tensor in stored.items():
        assert same(memory[f"p.{name}"], tensor.flatten().float() if name in router else tensor.flatten()), name


def _checkpoint(folder: Path, *, parts: int = 1, index: bool = False) -> Path:
    """A checkpoint of so many files, with an index or without."""
    folder.mkdir(parents=True)
    names = [f"model-{i:05d}-of-{parts:05d}.safetensors" for i in range(1, parts + 1)]
    names = names if parts > 1 else ["model.safetensors"]
    for i, name in enumerate(names):
        save_file({f"w{i}": torch.ones(64)}, folder / name)
    if index:
        weight_map = {f"w{i}": name for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_newest_checkpoint_is_the_one_whose_name_ends_highest(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-2", ".step-99", "best"):
        _checkpoint(tmp_path / name)
    (tmp_path / "step-100").touch()
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-10", 10)


def test_a_folder_that_is_a_checkpoint_is_the_newest(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "m")
    _checkpoint(tmp_path / "m" / "checkpoint-500")
    assert newest_checkpoint(tmp_path / "m") == (tmp_path / "m", 0)


def _torn(folder: Path) -> Iterator[tuple[Path, str]]:
    empty = folder / "empty-1"
    empty.mkdir(parents=True)
    yield empty, "it has no safetensors file"
    short = _checkpoint(folder / "short-1")
    whole = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(whole[:-7])
    yield short, "model.safetensors: "
    for index in (True, False):
        parts = _checkpoint(folder / f"parts-{index}-1", parts=3, index=index)
        (parts / "model-00003-of-00003.safetensors").unlink()
        yield parts, "1 files are missing, model-00003-of-00003.safetensors first"


def test_a_torn_checkpoint_is_passed_over_and_named_when_there_is_no_other(tmp_path: Path) -> None:
    """A trainer may have died as it wrote; the one before it is whole."""
    cases = list(_torn(tmp_path / "torn"))
    assert len(cases) == 4
    for number, (torn, words) in enumerate(cases):
        folder = tmp_path / f"run-{number}"
        torn.rename(folder.with_name(f"x{number}"))
        folder.mkdir()
        folder.with_name(f"x{number}").rename(folder / "step-20")
        with pytest.raises(ConfigError) as refused:
            newest_checkpoint(folder)
        assert f"step-20 is torn: {words}" in str(refused.value)
        _checkpoint(folder / "step-10", parts=2, index=True)
        assert newest_checkpoint(folder) == (folder / "step-10", 10)


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_a_checkpoint_is_refused_with_what_is_expected(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"holds no complete checkpoint: expected safetensors files, or folders of them"
    ):
        newest_checkpoint(tmp_path / name)


def test_an_index_that_is_none_is_a_torn_checkpoint_too(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "step-2")
    (_checkpoint(tmp_path / "step-3") / "model.safetensors.index.json").write_text("{")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-2", 2)
