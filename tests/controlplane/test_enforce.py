"""ModelExpress admits the pods of its own resource alone, where the cluster lets it ask whose a token is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.controlplane.builders import applied, make_context, make_seen, make_wanted
from tests.controlplane.conftest import helm_template
from weightsync_operator.plan.decide import Wanted, decide
from weightsync_operator.plan.render import Render, render
from weightsync_operator.settings import Settings, SettingsError

AUDIENCE = "modelexpress"


def _modelexpress(rendered: Render) -> dict[str, Any]:
    return next(
        child["spec"]["template"]["spec"]
        for child in rendered.base
        if (child["kind"], child["metadata"]["name"]) == ("Deployment", "ws-mx")
    )


def _environment(rendered: Render) -> dict[str, str]:
    (container,) = _modelexpress(rendered)["containers"]
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def test_modelexpress_has_an_account_of_its_own_and_admits_that_of_the_members() -> None:
    rendered = render(make_context(token_review=True))
    pod = _modelexpress(rendered)
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("ws.mx", True)
    assert rendered.names("ServiceAccount") == ("ws", "ws.mx")
    told = {name: value for name, value in _environment(rendered).items() if "SECURITY" in name}
    assert told == {
        "MODEL_EXPRESS_SECURITY_MODE": "enforce",
        "MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES": AUDIENCE,
        "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS": "ns:ws",
        "MODEL_EXPRESS_SECURITY_CACHE_TTL_SECS": "3600",
    }


@pytest.mark.parametrize(
    ("trainer", "engines", "admitted"),
    [
        ({"serviceAccountName": "reader"}, {}, "ns:reader,ns:ws"),
        ({"serviceAccountName": "reader"}, {"serviceAccountName": "reader"}, "ns:reader"),
        ({"serviceAccount": "ignored"}, {"serviceAccountName": None, "serviceAccount": "old"}, "ns:old,ns:ws"),
        ({"serviceAccountName": None}, {}, "ns:default,ns:ws"),
    ],
)
def test_modelexpress_admits_the_accounts_that_podtemplates_choose(
    trainer: dict[str, Any], engines: dict[str, Any], admitted: str
) -> None:
    templates = {"trainer": {"podTemplate": {"spec": trainer}}, "inference": {"podTemplate": {"spec": engines}}}
    rendered = render(make_context(token_review=True, **templates))
    assert _environment(rendered)["MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS"] == admitted


@pytest.mark.parametrize("role", ["engines", "trainer"])
def test_members_have_a_token_for_modelexpress_and_none_for_the_api_server(role: str) -> None:
    pod = getattr(render(make_context(token_review=True)), role)["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("ws", False)
    (volume,) = [v for v in pod["volumes"] if v["name"] == "member-token"]
    (source,) = volume["projected"]["sources"]
    assert source["serviceAccountToken"] == {"path": AUDIENCE, "audience": AUDIENCE, "expirationSeconds": 3600}
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "member-token"]
    assert mount["mountPath"] == "/var/run/secrets/tokens", "where ModelExpress's client looks for it"


def test_without_the_right_to_ask_nothing_of_it_is_rendered() -> None:
    for ctx in (make_context(), make_context(token_review=True, modelExpress={"external": {"address": "mx:8001"}})):
        rendered = render(ctx)
        everything = json.dumps(rendered.to_data())
        assert "member-token" not in everything
        assert "SECURITY" not in everything
        assert not rendered.enforces


def _told(wanted: Wanted, **fields: Any) -> tuple[str, str, str]:
    status = {"revision": wanted.in_force_revision}
    step = decide(wanted, make_seen(wanted.ctx, *applied(wanted), status=status, **fields))
    (found,) = [c for c in step.status.conditions if c.type == "SecurityEnforced"]
    return found.status, found.reason, found.message


def test_the_condition_says_who_is_admitted_and_what_is_missing() -> None:
    """1 enforced; 2 rendered before it could be; 3 the chart gives no right; 4 a Role only; 5 external; 6 nothing made yet."""
    assert _told(make_wanted(make_context(token_review=True)))[:2] == ("True", "Enforced")
    older = dataclasses.replace(
        make_wanted(make_context()), ctx=make_context(token_review=True), fresh=render(make_context(token_review=True))
    )
    assert _told(older)[:2] == ("False", "NotEnforced")
    assert "the next change of the spec" in _told(older)[2]
    plain = make_wanted(make_context())
    assert _told(plain)[1:] == (
        "NotEnforced",
        "ModelExpress admits every pod that reaches it: the chart was installed with tokenReview.create false, so that it may"
        " not check service-account tokens",
    )
    assert "tokenReview.granted" in _told(plain, cluster_wide=False)[2]
    external = make_wanted(make_context(token_review=True, modelExpress={"external": {"address": "mx:8001"}}))
    assert _told(external) == ("False", "NotEnforced", "the external ModelExpress decides itself whom it admits")
    nothing = dataclasses.replace(make_wanted(make_context(token_review=True)), in_force=None, in_force_revision="")
    assert _told(nothing)[:2] == ("Unknown", "NotStarted")


@pytest.mark.parametrize(
    ("options", "bound", "may"),
    [
        ((), True, "true"),
        (("--set=tokenReview.create=false",), False, "false"),
        (("--set=watchNamespaces={a}",), False, "false"),
        (("--set=tokenReview=null",), False, "false"),  # as with --reuse-values of a release before it
        (("--set=watchNamespaces={a}", "--set=tokenReview.granted=true"), False, "true"),
    ],
)
def test_the_chart_gives_the_right_and_tells_the_operator(options: tuple[str, ...], bound: bool, may: str) -> None:
    rendered = [manifest for manifest in yaml.safe_load_all(helm_template(*options).stdout) if manifest]
    names = [m["metadata"]["name"] for m in rendered if m["kind"] == "ClusterRoleBinding"]
    assert ("ws-operator-token-review" in names) == bound
    (deployment,) = [m for m in rendered if m["kind"] == "Deployment"]
    environ = {e["name"]: e["value"] for e in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environ["WEIGHTSYNC_TOKEN_REVIEW"] == may


def test_the_operator_reads_the_right_from_its_environment(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("x" * 64)
    images = {f"WEIGHTSYNC_IMAGE_{name}": "x" for name in ("RUNTIME", "REDIS", "MODELEXPRESS")}
    environ = {**images, "WEIGHTSYNC_OPERATOR_KEY_FILE": str(key)}
    assert not Settings.load(environ).defaults.token_review
    assert Settings.load({**environ, "WEIGHTSYNC_TOKEN_REVIEW": "true"}).defaults.token_review
    with pytest.raises(SettingsError, match="must be true or false"):
        Settings.load({**environ, "WEIGHTSYNC_TOKEN_REVIEW": "yes"})
