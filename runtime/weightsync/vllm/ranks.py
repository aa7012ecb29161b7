"""The ranks of a replica: their numbers, and one call that all of them answer.

With data parallelism vLLM 0.32 has an engine core process for each data-parallel rank, with workers of its own. All of them are one
replica. The client's `collective_rpc` reaches every core and returns what the first one's workers say
(vllm/v1/engine/core_client.py, DPLBAsyncMPClient); `call_utility_all_async` below it returns what all say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightsync.errors import ConfigError
from weightsync.rank_state import Description
from weightsync.rendezvous.incarnation import pod_of


def number_of(parallel: Any, rank: int) -> int:
    """Number in its replica of the worker `rank` of an engine core: data-parallel rank * workers of a core + `rank`.

    `data_parallel_index`, since cores of dense models know nothing of each other and all call themselves data-parallel rank 0.
    """
    return parallel.data_parallel_index * parallel.world_size + rank


def require_one_client(parallel: Any) -> None:
    """Raises ConfigError unless one API server process will reach all data-parallel ranks of an engine with that configuration."""
    if parallel.data_parallel_size > 1 and parallel.local_engines_only:
        raise ConfigError(
            f"each API server would reach some of {parallel.data_parallel_size} data-parallel ranks, and a replica commits as a "
            "whole: leave out --data-parallel-rank, --data-parallel-external-lb, --data-parallel-multi-port-external-lb and "
            "--data-parallel-hybrid-lb"
        )
    if parallel._api_process_count > 1:
        raise ConfigError(
            f"{parallel._api_process_count} API server processes would each open pushes on one engine: vllm serve "
            "--data-parallel-size makes as many of them as ranks, add --api-server-count 1"
        )


def require_every_rank(ranks: Sequence[Description], *, pod_uid: str) -> None:
    """Raises ConfigError unless these are the ranks 0, 1, ... of one replica, all in the pod with that UID."""
    numbers = [rank.rank for rank in ranks]
    if numbers != list(range(len(ranks))):
        raise ConfigError(
            f"the engine's workers call themselves ranks {numbers}: two of them would be one to a trainer; start the engine "
            "with vLLM's own executors (mp, uni)"
        )
    elsewhere = sorted(rank.rank for rank in ranks if pod_of(rank.incarnation) != pod_uid)
    if elsewhere:
        raise ConfigError(
            f"ranks {elsewhere} of {len(ranks)} run in another pod than their API server ({pod_uid}): a replica over several "
            "pods is refused; keep tp * dp within one pod, or start more replicas"
        )


class AllRanks:
    """vLLM's client of a data-parallel engine, whose `collective_rpc` returns the answers of all ranks, by their numbers."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[Any]:
        """Call all workers of all cores at once. Raises what any core raises."""
        core = self._client.engine_core
        answers = await core.call_utility_all_async("collective_rpc", method, timeout, args, None)
        return [answer for of_core in answers for answer in of_core]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def reaching_all_ranks(client: Any) -> Any:
    """vLLM's client itself where there is one engine core."""
    return AllRanks(client) if is_data_parallel(client) else client


def is_data_parallel(client: Any) -> bool:
    """Whether there are several engine cores."""
    return client.vllm_config.parallel_config.data_parallel_size > 1


def go_on_together(client: Any) -> bool:
    """Whether its cores pause and resume by consensus: dense models' know nothing of each other (vllm/v1/engine/core.py)."""
    return is_data_parallel(client) and client.vllm_config.model_config.is_moe
