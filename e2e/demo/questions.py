"""What the engines are asked: the task's prompts for a mean reward, twenty others for a comparison token by token.

Pure apart from the client that it is handed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from e2e.demo.client import Client
from e2e.demo.report import Mismatch, RewardSummary, summarize
from examples.smollm2.task import MAX_TOKENS, PROMPTS, messages, reward

SAMPLES = 96
"""Answers of the baseline and of the final measurement."""
GREEDY_TOKENS = 16
GREEDY_PROMPTS = (
    *PROMPTS,
    "What is two plus two?",
    "Who wrote Hamlet?",
    "What is the largest planet?",
    "Name a fruit.",
    "How do birds fly?",
    "What is a computer?",
    "Why is the sky blue?",
    "Tell me a short story.",
    "What do cats eat?",
    "Where is Mount Everest?",
    "What is water made of?",
    "Name a famous painter.",
    "How do I boil an egg?",
    "What is music?",
    "Who was the first person on the moon?",
    "Describe a forest.",
)

Completion = tuple[int, ...]


def sample_rewards(client: Client, service_url: str, *, samples: int = SAMPLES) -> tuple[RewardSummary, str]:
    """The service's mean reward over the task's prompts, sampled as the trainer samples, and one answer to show."""
    each = -(-samples // len(PROMPTS))
    sampling = {"n": each, "max_tokens": MAX_TOKENS, "temperature": 1.0, "top_p": 1.0}
    lanes = [[_request(service_url, prompt, sampling)] for prompt in PROMPTS]
    texts = [choice["message"]["content"] or "" for [body] in client.ask(lanes) for choice in body["choices"]]
    return summarize([reward(text) for text in texts]), texts[0]


def greedy_answers(client: Client, engines: Mapping[str, str]) -> dict[str, list[Completion]]:
    """Each engine's greedy token ids to the twenty prompts, by the engine's name; `engines` maps names to URLs.

    An engine gets one prompt at a time: the shape of a batch decides how a sum of bf16 products is rounded.
    """
    greedy = {"max_tokens": GREEDY_TOKENS, "temperature": 0.0, "return_token_ids": True}
    lanes = [[_request(url, prompt, greedy) for prompt in GREEDY_PROMPTS] for url in engines.values()]
    answers = client.ask(lanes)
    return {
        name: [tuple(body["choices"][0]["token_ids"]) for body in lane]
        for name, lane in zip(engines, answers, strict=True)
    }


def mismatches(live: Mapping[str, Sequence[Completion]], fresh: Sequence[Completion]) -> list[Mismatch]:
    """Where a live engine's answer differs from the fresh one's, at its first token that does."""
    found = []
    for engine, answers in live.items():
        for prompt, mine, wanted in zip(GREEDY_PROMPTS, answers, fresh, strict=True):
            if mine != wanted:
                same = next(
                    (i for i, (a, b) in enumerate(zip(mine, wanted, strict=False)) if a != b),
                    min(len(mine), len(wanted)),
                )
                found.append(Mismatch(engine=engine, prompt=prompt, first_token=same))
    return found


def _request(url: str, prompt: str, sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {"url": f"{url}/v1/chat/completions", "body": {"messages": messages(prompt), **sampling}}
