"""Thin Kopf handlers: events of WeightSyncs poke the queue. They change nothing and return nothing; `children.py` does the rest.

`on.event` alone, on purpose: with daemons, delete handlers or indices Kopf puts a finalizer on every resource.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import kopf

from weightsync_operator.api.names import GROUP, PLURAL, VERSION

RETRIES_S = (1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 30.0)


class EndlessRetries:
    """Seconds before each repetition of a request of Kopf's that was refused or not answered; the last one repeats.

    Kopf's own end after 54 s, and its watch with them: an outage of RBAC or of the API server may last longer.
    """

    def __iter__(self) -> Iterator[float]:
        return itertools.chain(RETRIES_S, itertools.repeat(RETRIES_S[-1]))


def operator_settings(*, cluster_wide: bool = True) -> kopf.OperatorSettings:
    """No peering, no events, no leftovers on objects.

    Unless `cluster_wide`, neither CRDs nor namespaces are watched: the CRD has to be there first.
    """
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = not cluster_wide
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.networking.error_backoffs = EndlessRetries()
    return settings


def register(registry: kopf.OperatorRegistry, poke: Callable[[tuple[str, str]], None]) -> None:
    """Put the handler on `registry`; `poke((namespace, name))` is called for each event of a WeightSync."""

    async def on_resource(*, namespace: str | None, name: str, **_: Any) -> None:
        poke((str(namespace), name))

    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry, id="resource")(on_resource)
