"""What one member of a session seals, its members open, as that rank's alone; everybody else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from weightsync.errors import RendezvousUnavailable
from weightsync.rendezvous.sealing import Seal

SECRET = "0123456789abcdef0123456789abcdef"
RANK: dict[str, Any] = {"replica": "engine-0", "incarnation": "pod-1.1+pod-1.2", "rank": 3}
CONTENT = b"remote keys" * 100


def seal(secret: str = SECRET, session: str = "s1") -> Seal:
    return Seal(secret=secret, session=session)


def test_another_process_of_the_session_opens_what_was_sealed() -> None:
    assert seal().open(seal().seal(CONTENT, **RANK), **RANK) == CONTENT


def test_nothing_of_the_content_shows_and_no_two_boxes_are_alike() -> None:
    """The same nonce twice under one key would give the key of the checksums away."""
    one, two = (seal().seal(CONTENT, **RANK) for _ in range(2))
    assert b"remote" not in one
    assert one[:12] != two[:12] and one[12:] != two[12:]


@pytest.mark.failure_mode(36)
@pytest.mark.parametrize("other", [{"secret": SECRET[:-1] + "0"}, {"session": "s2"}], ids=str)
def test_who_has_another_secret_or_session_opens_nothing(other: dict[str, str]) -> None:
    """Seen to fail with the session left out of the key's derivation and of what the box is bound to."""
    with pytest.raises(RendezvousUnavailable, match=r"engine-0/pod-1.1\+pod-1.2/3 was not sealed by that rank"):
        seal(**other).open(seal().seal(CONTENT, **RANK), **RANK)


@pytest.mark.failure_mode(18, 36)
@pytest.mark.parametrize("other", [{"replica": "engine-1"}, {"incarnation": "pod-1.1"}, {"rank": 0}], ids=str)
def test_a_box_does_not_pass_for_another_ranks(other: dict[str, Any]) -> None:
    """A member's own box, copied under another name: bytes would go to a rank's, or a dead engine's, memory.

    Seen to fail with the box bound to nothing.
    """
    with pytest.raises(RendezvousUnavailable, match="was not sealed by that rank"):
        seal().open(seal().seal(CONTENT, **RANK), **(RANK | other))


@pytest.mark.failure_mode(36)
@pytest.mark.parametrize("at", [0, 11, 12, 500, -1])
def test_one_altered_bit_is_refused(at: int) -> None:
    """In the nonce, the content, the checksum."""
    box = bytearray(seal().seal(CONTENT, **RANK))
    box[at] ^= 1
    with pytest.raises(RendezvousUnavailable, match="altered"):
        seal().open(bytes(box), **RANK)


@pytest.mark.parametrize("box", [b"", b"short", bytes(12), bytes(27)], ids=len)
def test_what_is_no_box_is_refused(box: bytes) -> None:
    with pytest.raises(RendezvousUnavailable, match="was not sealed by that rank"):
        seal().open(box, **RANK)
