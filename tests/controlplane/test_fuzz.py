"""Mutated manifests against a real API server and a running operator: each is refused with a path, or it is reconciled.

`WEIGHTSYNC_FUZZ=2000` runs that many; the draws are the same each time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.controlplane.kube import Kube, Kubelet, wait_until
from tests.controlplane.mutations import manifests
from weightsync_operator.api.names import API_VERSION, LABEL_COMPONENT, PLURAL, Component

COUNT = int(os.environ.get("WEIGHTSYNC_FUZZ", "100"))
BATCH = 50
"""So many are made at once: waiting for one alone is what takes time."""
BATCH_TIMEOUT_S = 120.0
_PATH = re.compile(r"\b(spec|metadata)\b")


class _Batch:
    """Some mutated manifests under names of their own."""

    def __init__(self, kube: Kube, specs: list[dict[str, Any]]) -> None:
        self._kube = kube
        self.specs = {f"fuzz-{number}": spec for number, spec in enumerate(specs)}
        self.refused: dict[str, str] = {}
        self.seen: dict[str, dict[str, Any]] = {}

    def create(self) -> None:
        """Send all; a refusal has to be the sender's fault and to name the field."""
        for name, spec in self.specs.items():
            body = {"apiVersion": API_VERSION, "kind": "WeightSync", "metadata": {"name": name}, "spec": spec}
            code, message = self._post(body)
            assert code in (201, 400, 422), f"{code}: {message}\n{json.dumps(spec)}"
            assert code == 201 or _PATH.search(message), f"no path: {message}\n{json.dumps(spec)}"
            if code != 201:
                self.refused[name] = message

    def _post(self, body: dict[str, Any]) -> tuple[int, str]:
        try:
            self._kube.request("POST", self._kube.path(PLURAL) + "?fieldValidation=Strict", body)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["message"]
        return 201, ""

    def unsettled(self) -> dict[str, Any]:
        """Accepted ones that are neither refused by the operator with a path nor brought up, with what is known of each."""
        self._answer_preflights()
        fleets = self._kube.list("statefulsets")
        self.seen = self._kube.list(PLURAL)
        return {
            name: resource.get("status", {}).get("conditions")
            for name, resource in self.seen.items()
            if not _refused(resource) and not (_in_force(resource) and f"{name}-inference" in fleets)
        }

    def _answer_preflights(self) -> None:
        for pod in self._kube.list("pods").values():
            asked = pod["metadata"]["labels"].get(LABEL_COMPONENT) == Component.PREFLIGHT
            if asked and pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]:
                with contextlib.suppress(urllib.error.HTTPError):  # it was taken away meanwhile
                    Kubelet(self._kube).end(pod, exit_code=0, message=json.dumps({"ok": True, "errors": []}))

    def remove(self) -> None:
        for name in self._kube.list(PLURAL):
            self._kube.delete(PLURAL, name)
        wait_until("all are gone", lambda: list(self._kube.list(PLURAL)), lambda names: names == [])
        wait_until("their fleets are gone", lambda: list(self._kube.list("statefulsets")), lambda names: names == [])


def _spec_valid(resource: dict[str, Any]) -> dict[str, Any]:
    conditions = resource.get("status", {}).get("conditions") or []
    found = next((condition for condition in conditions if condition["type"] == "SpecValid"), {})
    return found if found.get("observedGeneration") == resource["metadata"]["generation"] else {}


def _refused(resource: dict[str, Any]) -> bool:
    condition = _spec_valid(resource)
    return condition.get("status") == "False" and condition["message"].startswith("spec")


def _in_force(resource: dict[str, Any]) -> bool:
    return _spec_valid(resource).get("status") == "True"


@pytest.mark.timeout(60 + COUNT * 3)
@pytest.mark.failure_mode(65)
def test_every_mutation_is_refused_with_a_path_or_reconciled(kube: Kube, operator: Path) -> None:
    """The fixture `operator` fails the test for any traceback in the operator's log."""
    failures: list[AssertionError] = []
    outcomes = {"refused by the API server": 0, "refused by the operator": 0, "brought up": 0}

    @settings(
        max_examples=max(1, COUNT // BATCH), deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.lists(manifests(), min_size=BATCH, max_size=BATCH))
    def run(specs: list[dict[str, Any]]) -> None:
        if failures:  # hypothesis runs a failed batch again, which would only wait again
            raise failures[0]
        batch = _Batch(kube, specs)
        try:
            batch.create()
            wait_until("all are settled", lambda: sorted(batch.unsettled()), lambda left: left == [], BATCH_TIMEOUT_S)
        except AssertionError as error:
            stuck = {name: [batch.specs[name], conditions] for name, conditions in batch.unsettled().items()}
            failures.append(AssertionError(f"{error}\n{json.dumps(stuck)}"))
            raise failures[0] from error
        outcomes["refused by the API server"] += len(batch.refused)
        outcomes["refused by the operator"] += sum(_refused(resource) for resource in batch.seen.values())
        outcomes["brought up"] += sum(_in_force(resource) for resource in batch.seen.values())
        batch.remove()

    run()
    print(f"\n{outcomes}")
    assert min(outcomes.values()) > 0, f"the mutations are too wild or too tame: {outcomes}"
    said = operator.read_text()
    assert "this is a bug of the operator" not in said
