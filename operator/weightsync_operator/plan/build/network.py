"""Services, the budget for drains, and the account without rights that all pods run under. Pure."""

from __future__ import annotations

from weightsync_operator.api.names import Component
from weightsync_operator.api.spec import TRAINER_PORT
from weightsync_operator.plan.build.context import (
    INFERENCE_PORT,
    MODEL_EXPRESS_PORT,
    REDIS_PORT,
    Context,
    Manifest,
    selector_labels,
)


def service_account(ctx: Context) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": ctx.metadata(ctx.owner.name, Component.CONTRACT),
        "automountServiceAccountToken": False,
    }


def services(ctx: Context) -> list[Manifest]:
    """One a role; peers find each other by headless ones that show pods before they are ready."""
    managed = [
        _service(ctx, "redis", Component.REDIS, REDIS_PORT) if ctx.spec.redis.external is None else None,
        _service(ctx, "mx", Component.MODEL_EXPRESS, MODEL_EXPRESS_PORT)
        if ctx.spec.model_express.external is None
        else None,
    ]
    return [
        *(service for service in managed if service is not None),
        _headless(ctx, "trainer", Component.TRAINER, TRAINER_PORT),
        _headless(ctx, "engines", Component.INFERENCE, INFERENCE_PORT),
        _service(ctx, "inference", Component.INFERENCE, INFERENCE_PORT),
    ]


def disruption_budget(ctx: Context) -> Manifest:
    """AlwaysAllow: an engine that is unready itself must not hold up a drain."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": ctx.metadata(ctx.child("inference"), Component.INFERENCE),
        "spec": {
            "maxUnavailable": ctx.spec.inference.max_unavailable,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": selector_labels(ctx.owner.name, Component.INFERENCE)},
        },
    }


def _service(ctx: Context, suffix: str, component: Component, port: int) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": ctx.metadata(ctx.child(suffix), component),
        "spec": {
            "type": "ClusterIP",
            "selector": selector_labels(ctx.owner.name, component),
            "ports": [{"name": "main", "port": port, "targetPort": port, "protocol": "TCP"}],
        },
    }


def _headless(ctx: Context, suffix: str, component: Component, port: int) -> Manifest:
    service = _service(ctx, suffix, component, port)
    service["spec"] |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    return service
