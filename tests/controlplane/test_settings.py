"""The operator says in one line what is missing, and starts with nothing half-set."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightsync_operator.settings import Settings, SettingsError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    key = tmp_path / "key"
    key.write_text("k" * 32)
    return {
        "WEIGHTSYNC_IMAGE_RUNTIME": "r",
        "WEIGHTSYNC_IMAGE_REDIS": "d",
        "WEIGHTSYNC_IMAGE_MODELEXPRESS": "m",
        "WEIGHTSYNC_OPERATOR_KEY_FILE": str(key),
    }


def test_what_is_not_set_has_a_default(environ: dict[str, str]) -> None:
    settings = Settings.load(environ)
    assert (settings.port, settings.kubeconfig, settings.defaults.pull_policy) == (8080, None, "IfNotPresent")


def test_the_key_is_in_no_log(environ: dict[str, str]) -> None:
    assert "kkkk" not in repr(Settings.load(environ))


@pytest.mark.parametrize("name", ["WEIGHTSYNC_IMAGE_RUNTIME", "WEIGHTSYNC_IMAGE_REDIS", "WEIGHTSYNC_OPERATOR_KEY_FILE"])
def test_a_missing_variable_is_named(environ: dict[str, str], name: str) -> None:
    del environ[name]
    with pytest.raises(SettingsError, match=name):
        Settings.load(environ)


@pytest.mark.parametrize("port", ["", "x", "0", "70000", "-1"])
def test_a_bad_port_is_named(environ: dict[str, str], port: str) -> None:
    with pytest.raises(SettingsError, match="WEIGHTSYNC_PORT"):
        Settings.load({**environ, "WEIGHTSYNC_PORT": port})


def test_a_missing_and_a_short_key_are_refused(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        Settings.load({**environ, "WEIGHTSYNC_OPERATOR_KEY_FILE": str(tmp_path / "none")})
    (tmp_path / "short").write_text("k")
    with pytest.raises(SettingsError, match="holds 1 bytes: 32 or more"):
        Settings.load({**environ, "WEIGHTSYNC_OPERATOR_KEY_FILE": str(tmp_path / "short")})


def test_the_lease_is_named_by_its_place_and_lasts_as_long_as_set(environ: dict[str, str]) -> None:
    assert Settings.load(environ).lease is None, "the only operator, outside a cluster"
    lease = Settings.load({**environ, "WEIGHTSYNC_LEASE": "system/ws-operator"}).lease
    assert lease is not None
    assert (lease.namespace, lease.name, lease.duration_s) == ("system", "ws-operator", 15.0)
    assert lease.renew_within_s < lease.duration_s, "whoever leads stops before another may begin"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("", "ws"), ("", "/ws"), ("", "ns/"), ("_SECONDS", "4"), ("_SECONDS", "x"), ("_SECONDS", "301")],
)
def test_a_bad_lease_is_named(environ: dict[str, str], variable: str, value: str) -> None:
    name = f"WEIGHTSYNC_LEASE{variable}"
    with pytest.raises(SettingsError, match=name):
        Settings.load({**environ, "WEIGHTSYNC_LEASE": "ns/ws", name: value})


def test_an_unknown_log_format_is_named(environ: dict[str, str]) -> None:
    assert Settings.load({**environ, "WEIGHTSYNC_LOG_FORMAT": "json"}).log_format == "json"
    with pytest.raises(SettingsError, match="WEIGHTSYNC_LOG_FORMAT='xml': must be one of text, json"):
        Settings.load({**environ, "WEIGHTSYNC_LOG_FORMAT": "xml"})
