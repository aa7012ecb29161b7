"""The rule that the example's model is taught by."""

import pytest

from examples.smollm2.task import messages, reward


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("PARIS", 1.0),
        ("paris", 0.0),
        ("PAris", 0.4),
        ("A b, 12!", 0.5),
        ("", 0.0),
        ("12 + 3 =", 0.0),
        ("ÉCOLE é", 5 / 6),
    ],
)
def test_reward_is_the_share_of_capitals_among_letters(answer: str, expected: float):
    assert reward(answer) == pytest.approx(expected)


def test_chat_keeps_the_template_from_adding_its_own_system_message():
    assert [(each["role"], each["content"]) for each in messages("Hi?")] == [("system", ""), ("user", "Hi?")]
