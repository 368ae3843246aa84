"""Settings of access are checked before a server starts, and it warns about what is open to others."""

from __future__ import annotations

from pathlib import Path

import pytest

from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway.access import AccessControl, check_access_files
from clockwork_serve.serve.gateway.settings import GatewayConfig, check_gateways
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.serve.supervisor.server import Server
from clockwork_serve.store import StoreConfig
from tests.serve.certificates import certificates
from tests.serve.gateway.keys import entry, written


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tls_certificate": "c"}, "tls_key"),
        ({"tls_key": "k"}, "tls_certificate"),
        ({"tls_client_ca": "a"}, "tls_certificate"),
        ({"tls_client_ca": "a", "tls_certificate": "c"}, "tls_key"),
    ],
)
def test_files_that_belong_together_must_be_given(fields: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: expected a PEM file.*found none; name both"):
        check_gateways(Settings(**fields))


@pytest.mark.parametrize("field", ["api_keys", "tls_certificate"])
def test_a_bad_file_ends_a_start_before_anything_is_started(tmp_path: Path, field: str) -> None:
    fields = {"tls_key": "/none"} if field == "tls_certificate" else {}
    (tmp_path / "models").mkdir()
    config = ServerConfig(
        settings=Settings(
            repository=str(tmp_path / "models"),
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            **{field: "/none"},
            **fields,
        ),
        store=StoreConfig(cache_dir=str(tmp_path / "cache")),
        run_dir=str(tmp_path),
    )
    with pytest.raises(ConfigError, match=f"^{field}: expected a readable file; found No such file"):
        Server(config)
    assert [item.name for item in tmp_path.iterdir()] == ["models"]


def test_without_settings_access_is_open() -> None:
    access = AccessControl(GatewayConfig(run_dir="", name="g0"))
    assert (access.keys, access.tls) == (None, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_a_server_reachable_from_other_hosts_warns_of_what_is_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str
) -> None:
    keys = written(tmp_path, entry("a", "k", "infer"))
    files = certificates(tmp_path)
    check_access_files(Settings(host=host))
    assert f"listening on {host}, and everyone who can connect may do everything" in caplog.text
    caplog.clear()
    check_access_files(Settings(host=host, api_keys=keys))
    assert "without TLS" in caplog.text
    caplog.clear()
    check_access_files(Settings(host=host, **files.tls_settings()))
    assert "may do everything" in caplog.text
    caplog.clear()
    check_access_files(Settings(host=host, **files.tls_settings(api_keys=keys)))
    check_access_files(Settings(host=host, **files.tls_settings(mutual=True)))
    assert not caplog.records


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_server_reachable_from_its_own_host_only_warns_of_nothing(
    caplog: pytest.LogCaptureFixture, host: str
) -> None:

    check_access_files(Settings(host=host))
    assert not caplog.records


def test_a_key_that_everybody_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = certificates(tmp_path)
    Path(files.key).chmod(0o644)
    check_access_files(Settings(**files.tls_settings()))
    assert "tls_key: every user of this host may read" in caplog.text
