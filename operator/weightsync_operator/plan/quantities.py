"""Quantities as Kubernetes writes them. Pure."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_SCALE = {
    "m": Decimal("0.001"), "": Decimal(1),
    "k": Decimal(10) ** 3, "M": Decimal(10) ** 6, "G": Decimal(10) ** 9, "T": Decimal(10) ** 12,
    "Ki": Decimal(2) ** 10, "Mi": Decimal(2) ** 20, "Gi": Decimal(2) ** 30, "Ti": Decimal(2) ** 40,
}  # fmt: skip


def exact(text: Any) -> Decimal | None:
    """The value of a quantity; None for what is none."""
    match = None if isinstance(text, bool) else _QUANTITY.fullmatch(str(text))
    return None if match is None else Decimal(match[1]) * _SCALE[match[2] or ""]


def quantity(text: Any) -> int | None:
    """As `exact`, in whole units."""
    value = exact(text)
    return None if value is None else int(value)
