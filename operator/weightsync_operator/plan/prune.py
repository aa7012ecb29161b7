"""Children that no pod and no spec needs any more. Pure; only objects that the resource itself controls are named."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from weightsync_operator.api.names import Component
from weightsync_operator.plan.actions import Delete
from weightsync_operator.plan.build.context import Manifest
from weightsync_operator.plan.observed import Seen, is_deleting, of_session

REVISIONS_KEPT = 3


def stale_contracts(seen: Seen, contract_name: str) -> Iterator[Delete]:
    """Contracts of older specs, once no pod mounts them."""
    volumes = [volume for pod in of_session(seen, "Pod") for volume in pod["spec"].get("volumes") or []]
    mounted = {volume.get("configMap", {}).get("name") for volume in volumes}
    for config_map in seen.of_kind("ConfigMap", Component.CONTRACT):
        if config_map["metadata"]["name"] not in {contract_name, *mounted}:
            yield _delete(config_map)


def stale_claim_templates(seen: Seen, names: Collection[str]) -> Iterator[Delete]:
    """ResourceClaimTemplates of older specs, once no pod was made by them."""
    claims = [claim for pod in of_session(seen, "Pod") for claim in pod["spec"].get("resourceClaims") or []]
    used = {claim.get("resourceClaimTemplateName") for claim in claims}
    for template in of_session(seen, "ResourceClaimTemplate"):
        if template["metadata"]["name"] not in {*names, *used}:
            yield _delete(template)


def stale_policies(seen: Seen, names: Collection[str]) -> Iterator[Delete]:
    """NetworkPolicies that the render in force does not have: going back to an older one must not leave a newer one's walls."""
    for component in Component:
        for policy in seen.of_kind("NetworkPolicy", component):
            if policy["metadata"]["name"] not in names and not is_deleting(policy):
                yield _delete(policy)


def stale_revisions(seen: Seen, in_force: str) -> Iterator[Delete]:
    """All but the newest few renders and the one in force."""
    revisions = [
        r
        for r in seen.of_kind("ControllerRevision", Component.CONTRACT)
        if not r["metadata"]["name"].endswith(f"-{in_force}")
    ]
    for revision in sorted(revisions, key=lambda r: r["revision"])[: -(REVISIONS_KEPT - 1)]:
        yield _delete(revision)


def stale_preflights(seen: Seen, waited_for: str | None) -> Iterator[Delete]:
    """Preflight pods whose verdict is noted, or that nobody waits for any more."""
    for pod in seen.of_kind("Pod", Component.PREFLIGHT):
        if pod["metadata"]["name"] != waited_for and not is_deleting(pod):
            yield _delete(pod)


def _delete(child: Manifest) -> Delete:
    return Delete(kind=child["kind"], name=child["metadata"]["name"], uid=child["metadata"]["uid"])
