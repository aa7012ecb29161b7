"""Ranks of a data-parallel replica: their numbers, who answers for them, which engines are refused, and what a plan gives each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.dataplane.test_plan import attention, experts
from tests.dataplane.test_replica import rank_of
from tests.dataplane.toy_models import chunked, execute, flat_bits
from weightsync.errors import ConfigError
from weightsync.layout.meshes import EngineMesh, chunk
from weightsync.plan import make_plan
from weightsync.rendezvous.incarnation import pod_of, process_word
from weightsync.vllm.ranks import AllRanks, number_of, reaching_all_ranks, require_every_rank, require_one_client


def parallel(**changes: Any) -> Any:
    """vLLM's ParallelConfig as an API server process has it."""
    fields = {"data_parallel_size": 2, "local_engines_only": False, "_api_process_count": 1}
    return SimpleNamespace(**(fields | changes))


@pytest.mark.failure_mode(29)
@pytest.mark.parametrize("mesh", [EngineMesh(tensor=1, data=4), EngineMesh(tensor=2, data=3), EngineMesh(tensor=4)])
def test_every_worker_of_a_replica_has_a_number_of_its_own(mesh: EngineMesh) -> None:
    """A dense model's engine cores all call themselves data-parallel rank 0: by `data_parallel_rank` two workers would be one."""
    numbers = [
        number_of(SimpleNamespace(data_parallel_rank=0, data_parallel_index=data, world_size=mesh.tensor), rank)
        for data in range(mesh.data)
        for rank in range(mesh.tensor)
    ]
    assert numbers == list(range(mesh.ranks))


class Client:
    """vLLM's client of two engine cores with two workers each."""

    def __init__(self, data_parallel_size: int = 2) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=parallel(data_parallel_size=data_parallel_size))
        self.engine_core = self

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[str]:
        return (await self.call_utility_all_async("collective_rpc", method, timeout, args, None))[0]

    async def call_utility_all_async(self, utility: str, *told: Any) -> list[Any]:
        assert (utility, told) == ("collective_rpc", ("describe", None, ("all",), None))
        return [["core 0 rank 0", "core 0 rank 1"], ["core 1 rank 0", "core 1 rank 1"]]

    async def is_paused(self) -> bool:
        return True


@pytest.mark.failure_mode(57)
@pytest.mark.asyncio
async def test_the_workers_of_all_engine_cores_answer_and_not_only_the_first_one_s() -> None:
    engine = reaching_all_ranks(Client())
    answers = await engine.collective_rpc("describe", args=("all",))
    assert answers == ["core 0 rank 0", "core 0 rank 1", "core 1 rank 0", "core 1 rank 1"]
    assert await engine.is_paused()
    assert not isinstance(reaching_all_ranks(Client(data_parallel_size=1)), AllRanks)


@pytest.mark.vllm
@pytest.mark.failure_mode(57)
@pytest.mark.asyncio
async def test_vllm_s_own_client_drops_all_answers_but_the_first_core_s_and_ours_does_not() -> None:
    """The class that an API server of a data-parallel engine has, without its sockets."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    async def call(method: str, *told: Any, engine: bytes) -> list[str]:
        assert (method, told) == ("collective_rpc", ("describe", None, ("all",), None))
        return [f"{engine.decode()}.{rank}" for rank in range(2)]

    core: Any = DPLBAsyncMPClient.__new__(DPLBAsyncMPClient)
    core.core_engines, core._call_utility_async = [b"0", b"1"], call
    assert await core.collective_rpc_async("describe", None, ("all",), None) == ["0.0", "0.1"]
    engine = AllRanks(SimpleNamespace(engine_core=core))
    assert await engine.collective_rpc("describe", args=("all",)) == ["0.0", "0.1", "1.0", "1.1"]


@pytest.mark.vllm
@pytest.mark.failure_mode(29)
def test_cores_of_a_dense_model_have_numbers_of_their_own_though_vllm_calls_them_all_rank_0() -> None:
    """As vLLM reconfigures each core (v1/engine/core.py, run_engine_core)."""
    from vllm.config import ParallelConfig

    numbers = []
    for rank in range(2):
        config = ParallelConfig(data_parallel_size=2, data_parallel_rank=rank)
        config.reconfigure_for_independent_dp_rank()
        assert (config.data_parallel_rank, config.data_parallel_size) == (0, 1)
        numbers.append(number_of(config, 0))
    assert numbers == [0, 1]


def test_an_api_server_that_reaches_some_ranks_and_one_of_several_are_refused_before_anything_loads() -> None:
    require_one_client(parallel())
    require_one_client(parallel(data_parallel_size=1, local_engines_only=True))
    with pytest.raises(ConfigError, match="leave out --data-parallel-rank, --data-parallel-external-lb"):
        require_one_client(parallel(local_engines_only=True))
    with pytest.raises(ConfigError, match=r"2 API server processes .* add --api-server-count 1"):
        require_one_client(parallel(_api_process_count=2))


def test_ranks_that_share_a_number_or_run_in_another_pod_are_refused() -> None:
    """A replica over several nodes would answer all the same: only its ranks know where they run."""
    here, there = f"{process_word('uid-a')}.1", f"{process_word('uid-b')}.1"
    assert pod_of(here) == "uid-a"
    require_every_rank([rank_of(0, incarnation=here), rank_of(1, incarnation=here)], pod_uid="uid-a")
    with pytest.raises(ConfigError, match=r"ranks \[0, 0\]"):
        require_every_rank([rank_of(0, incarnation=here), rank_of(0, incarnation=here)], pod_uid="uid-a")
    with pytest.raises(ConfigError, match=r"ranks \[1\] of 2 run in another pod"):
        require_every_rank([rank_of(0, incarnation=here), rank_of(1, incarnation=there)], pod_uid="uid-a")


def test_each_data_parallel_rank_of_a_dense_model_is_written_a_full_copy() -> None:
    """DP 2 x TP 2: ranks 0 and 2 want the same and so do 1 and 3; each of the four gets all that its loader would take."""
    mesh = EngineMesh(tensor=2, data=2)
    toys = [attention(tp=mesh.tensor, rank=number % mesh.tensor) for number in range(mesh.ranks)]
    layouts = chunked(toys[0].source_tensors(), 3)
    plans = [make_plan(layouts, toy.layout()) for toy in toys]
    assert [plan.digest for plan in plans[2:]] == [plan.digest for plan in plans[:2]]
    assert plans[0].digest != plans[1].digest
    for toy, plan in zip(toys, plans, strict=True):
        _assert_written_as_loaded(toy, plan, layouts)


@pytest.mark.failure_mode(2)
def test_expert_parallelism_shares_the_experts_over_data_and_tensor_parallel_ranks() -> None:
    """DP 2 x TP 2 and 8 experts: 2 each, by the rank's number; together every expert once, and no rank holds another's."""
    mesh, n_experts = EngineMesh(tensor=2, data=2, expert_parallel=True), 8
    shares = [chunk(range(n_experts), mesh.ranks, number) for number in range(mesh.ranks)]
    assert [expert for share in shares for expert in share] == list(range(n_experts))
    toys = [experts(n_experts, local=share) for share in shares]
    layouts = chunked(toys[0].source_tensors(), 2)
    plans = [make_plan(layouts, toy.layout()) for toy in toys]
    assert len({plan.digest for plan in plans}) == mesh.ranks
    whole = make_plan(layouts, experts(n_experts, local=range(n_experts)).layout())
    assert sum(plan.total_bytes for plan in plans) == whole.total_bytes
    for toy, plan in zip(toys, plans, strict=True):
        _assert_written_as_loaded(toy, plan, layouts)


def _assert_written_as_loaded(toy: Any, plan: Any, layouts: Any) -> None:
    weights = toy.weights()
    loaded, pushed = toy.fresh(), toy.fresh()
    loaded.load(weights.items())
    for param, first_row in toy.pads:
        pushed.params[param][first_row:] = 0
    execute(plan, layouts, weights, pushed.params)
    for name in toy.params:
        np.testing.assert_array_equal(flat_bits(pushed.params[name]), flat_bits(loaded.params[name]), err_msg=name)
