"""Run by test_replay_vllm in a process of its own: `python -m tests.dataplane.vllm_replay_probe FOLDER`.

For each family of tiny models, two engines of vLLM's CPU build with vLLM's own kernels, in a fork each: one loads a checkpoint and
has another one replayed into it, the other loads that one. Prints what was found as JSON, a line a family.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
os.environ.update(WEIGHTSYNC_CPU_KERNELS="vllm", OMP_NUM_THREADS="1")

ATTENTION = "CPU_MLA"
"""Where there is AMX, vLLM takes AMX_MLA, which can neither be written nor replayed. Without latent attention this is ignored."""
PROMPTS = [[1, 2, 3], [9, 8, 7, 6], [100, 200]]


def main(folder: Path) -> None:
    from tests.fixtures.models import FAMILIES
    from weightsync.vllm.serve import name_the_distribution

    name_the_distribution()
    from vllm import LLM  # noqa: F401 - imported once for all forks

    for family, make in FAMILIES.items():
        loaded, other = make(folder / family / "loaded"), make(folder / family / "other", seed=7)
        replayed = in_fork(lambda loaded=loaded, other=other: replay(loaded, other), folder / "replayed.json")
        fresh = in_fork(lambda other=other: held_by(start(other)), folder / "fresh.json")
        print(json.dumps({"family": family, "replayed": replayed, "fresh": fresh}), flush=True)


def in_fork(work: Callable[[], Any], file: Path) -> Any:
    """What `work` returns in a process of its own: vLLM's parallel state is a global, for one engine."""
    child = os.fork()
    if child == 0:
        try:
            file.write_text(json.dumps(work()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"{file.stem} ended with {os.waitstatus_to_exitcode(status)}"
    return json.loads(file.read_text())


def start(model: Path) -> Any:
    import torch
    from vllm import LLM

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    options = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, "dtype": "bfloat16"}
    return LLM(str(model), **options, attention_backend=ATTENTION)


def model_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def held_by(llm: Any) -> dict[str, Any]:
    """Answers, and a digest of every tensor that a module reaches; but those of attention, which has no weights of its own."""
    from vllm import SamplingParams

    from weightsync import verify
    from weightsync.vllm.kernels import swapped
    from weightsync.vllm.livememory import reachable

    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    digests = {}
    for name, module in model_of(llm).named_modules():
        for path, tensor in reachable(module, swapped(module)).items():
            if tensor.numel() and tensor.element_size() in (1, 2, 4):
                digests[f"{name}.{path}"] = verify.digest_tensor(path, tensor.contiguous())
    return {"answers": [list(answer.outputs[0].token_ids) for answer in answers], "digests": digests}


def replay(loaded: Path, other: Path) -> dict[str, Any]:
    """1. decide; 2. a replay that lacks a tensor; 3. a whole one; each with what live memory holds after it."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    from weightsync.errors import CoverageError
    from weightsync.vllm.kernels import kernel_of
    from weightsync.vllm.offer import make_offer
    from weightsync.vllm.worker import checkpoint_sources, refresh_derived

    llm = start(loaded)
    model, forward_context = model_of(llm), llm.llm_engine.vllm_config.compilation_config.static_forward_context
    before, globals_before = held_by(llm), ({k: id(v) for k, v in _ROPE_DICT.items()}, {**forward_context})
    offer: Any = make_offer(model, checkpoint_sources(str(loaded)), str(loaded))
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    bring(offer, other)
    whole = offer.replay._model.load_weights
    dropped = offer.replay._groups[0].sources[0].name
    offer.replay._model.load_weights = lambda weights: whole((n, t) for n, t in weights if n != dropped)
    untouched, refusal = dict(offer.replay.measure()), ""
    try:
        offer.replay.prepare(lambda: True)
    except CoverageError as error:
        refusal = str(error)
    offer.replay._model.load_weights = whole
    result = {
        "kernels": sorted({"/".join(kernel_of(module)) for module in model.modules()}),
        "direct": sorted(offer.params),
        "reasons": dict(offer.reasons),
        "untouched_by_the_probe": held_by(llm)["answers"] == before["answers"],
        "dropped": dropped,
        "refusal": refusal,
        "untouched_by_a_part": offer.replay.measure() == untouched,
    }
    offer.replay.prepare(lambda: True)
    offer.replay.apply()
    for name, tensor in direct_values(offer, other).items():
        offer.params[name].copy_(tensor)
    refresh_derived(model)
    return {
        **result,
        **held_by(llm),
        "before": before["answers"],
        "addresses_stay": addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()},
        "globals_stay": globals_before == ({k: id(v) for k, v in _ROPE_DICT.items()}, {**forward_context}),
    }


def bring(offer: Any, checkpoint: Path) -> None:
    """What a push does to the staged tensors."""
    from weightsync.replay import target_of
    from weightsync.vllm.probing import Checkpoint

    weights = Checkpoint(str(checkpoint))
    for source in offer.replay.sources.values():
        offer.replay.staged[target_of(source.name)].copy_(weights.get(source))


def direct_values(offer: Any, checkpoint: Path) -> dict[str, Any]:
    """What a push brings to each parameter that is written directly."""
    from weightsync.vllm.probing import Checkpoint

    weights, sources = Checkpoint(str(checkpoint)), {source.name: source for source in offer.layout.sources}
    values = {name: live.clone() for name, live in offer.params.items()}
    for copy in offer.layout.copies:
        if copy.target in values:
            into = values[copy.target].as_strided(copy.shape, copy.target_strides, copy.target_offset)
            tensor = weights.get(sources[copy.source])
            into.copy_(tensor.as_strided(copy.shape, copy.source_strides, copy.source_offset))
    return values


if __name__ == "__main__":
    main(Path(sys.argv[1]))
