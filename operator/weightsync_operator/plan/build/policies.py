"""NetworkPolicies: who may open a connection to which role of one resource. Pure.

Ingress alone is restricted: what a pod calls (DNS, an external Redis, an object store) is its user's affair. Policies add up, so
that a user who wants a port of a sidecar reached writes one more. A network that enforces nothing ignores them.
"""

from __future__ import annotations

from weightsync_operator.api.names import Component
from weightsync_operator.plan.build.context import (
    INFERENCE_PORT,
    MODEL_EXPRESS_METRICS_PORT,
    MODEL_EXPRESS_PORT,
    REDIS_PORT,
    Context,
    Manifest,
    selector_labels,
)

OPERATOR_LABELS = {"app.kubernetes.io/name": "weightsync-operator"}
"""Of the operator's own pods, in whatever namespace the chart was installed."""


def network_policies(ctx: Context) -> list[Manifest]:
    """One a role that the operator runs.

    None where a podTemplate puts pods on the host's network: they come from a node's address, which no selector matches.
    """
    checkpoint = ctx.spec.transfer.checkpoint
    overlays = [ctx.spec.trainer.pod_template, ctx.spec.inference.pod_template]
    overlays += [] if checkpoint is None else [checkpoint.pod_template]
    if any((overlay.get("spec") or {}).get("hostNetwork") is True for overlay in overlays):
        return []
    exchange = _from(ctx, *ctx.session_roles)
    policies = [
        # NIXL, gloo and NCCL listen at ports that nobody knows beforehand.
        _policy(ctx, "trainer", Component.TRAINER, [exchange, *map(_anyone, ctx.trainer_metrics_ports.values())]),
        # Clients come from anywhere; the endpoint's own routes want a token.
        _policy(ctx, "inference", Component.INFERENCE, [exchange, _anyone(INFERENCE_PORT)]),
    ]
    if checkpoint is not None:
        policies.append(_policy(ctx, "restore", Component.RESTORE, [exchange]))
    if ctx.spec.redis.external is None:
        ledger = _from(ctx, *ctx.session_roles, Component.MODEL_EXPRESS)
        operator = {"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": dict(OPERATOR_LABELS)}}]}
        policies.append(_policy(ctx, "redis", Component.REDIS, [_at(ledger, REDIS_PORT), _at(operator, REDIS_PORT)]))
    if ctx.spec.model_express.external is None:
        rules = [_at(exchange, MODEL_EXPRESS_PORT), _anyone(MODEL_EXPRESS_METRICS_PORT)]
        policies.append(_policy(ctx, "mx", Component.MODEL_EXPRESS, rules))
    return policies


def _policy(ctx: Context, suffix: str, component: Component, ingress: list[Manifest]) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": ctx.metadata(ctx.child(suffix), component),
        "spec": {
            "podSelector": {"matchLabels": selector_labels(ctx.owner.name, component)},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    }


def _from(ctx: Context, *components: Component) -> Manifest:
    """From pods of these roles of the same resource, at any port."""
    return {"from": [{"podSelector": {"matchLabels": selector_labels(ctx.owner.name, role)}} for role in components]}


def _at(rule: Manifest, port: int) -> Manifest:
    return {**rule, **_anyone(port)}


def _anyone(port: int) -> Manifest:
    return {"ports": [{"port": port, "protocol": "TCP"}]}
