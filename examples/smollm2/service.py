"""The inference service as the trainer sees it: an OpenAI-compatible URL that may be away for a while.

Answers come with the token ids of prompt and completion, as the engine saw them: the trainer tokenizes nothing, so it cannot
train on other tokens than those that were sampled. Imports httpx only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx


class ServiceUnavailable(Exception):
    """The service gave no usable answer now (restarting, behind, unreachable); asking again later may help."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Sampled tokens, the end token included when there is one."""
    text: str


class Service:
    """Asks `url` for completions; a connection a request, so that a Kubernetes Service spreads them over its engines."""

    def __init__(self, url: str, *, timeout_s: float = 120.0) -> None:
        self._url = url.rstrip("/") + "/v1/chat/completions"
        self._timeout_s = timeout_s

    def sample(
        self, chats: Sequence[list[dict[str, str]]], *, samples: int, max_tokens: int, reward: Callable[[str], float]
    ) -> list[list[tuple[Completion, float]]]:
        """`samples` scored answers to each chat, at temperature 1 and untruncated, so that they are on-policy.

        Raises ServiceUnavailable when any request fails in a way that may pass, httpx.HTTPStatusError when it is refused.
        """
        with ThreadPoolExecutor(len(chats)) as pool:
            answers = pool.map(lambda chat: self._ask(chat, samples, max_tokens), chats)
            return [[(answer, reward(answer.text)) for answer in group] for group in answers]

    def _ask(self, chat: list[dict[str, str]], samples: int, max_tokens: int) -> list[Completion]:
        body = {
            "messages": chat,
            "n": samples,
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "top_p": 1.0,
            "return_token_ids": True,
        }
        try:
            response = httpx.post(self._url, json=body, timeout=self._timeout_s)
        except httpx.TransportError as error:
            raise ServiceUnavailable(f"{self._url}: {type(error).__name__}: {error}") from error
        if response.status_code >= 500:
            raise ServiceUnavailable(f"{self._url}: {response.status_code}: {response.text[:200]}")
        response.raise_for_status()
        answer = response.json()
        prompt_ids = tuple(answer["prompt_token_ids"])
        return [_completion(prompt_ids, choice) for choice in answer["choices"]]


def _completion(prompt_ids: tuple[int, ...], choice: dict) -> Completion:
    if choice["finish_reason"] == "abort":
        raise ServiceUnavailable("an answer was aborted: its engine was paused or ended")
    return Completion(prompt_ids, tuple(choice["token_ids"]), choice["message"]["content"] or "")
