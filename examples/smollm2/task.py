"""What the model is taught: to answer in capital letters. The prompts and the rule that scores an answer; imports nothing.

The rule is dense (nearly every sample differs from its neighbours), cheap, and a person sees at once what has been learned.
"""

from __future__ import annotations

PROMPTS = (
    "What is the capital of France?",
    "Name three colors.",
    "How do I make tea?",
    "Tell me about the sea.",
)
MAX_TOKENS = 20
"""Length of an answer; the service cuts it there."""


def messages(prompt: str) -> list[dict[str, str]]:
    """The chat that asks `prompt`. The empty system message keeps the template from adding its own, longer one."""
    return [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]


def reward(answer: str) -> float:
    """Share of the answer's letters that are capitals, in [0, 1]; 0 for an answer without letters."""
    letters = [character for character in answer if character.isalpha()]
    return sum(letter.isupper() for letter in letters) / len(letters) if letters else 0.0
