"""Which source has precedence, and the errors of invalid settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.config import SETTINGS, Settings, default_cache, read_settings
from clockwork_serve.config.former import FORMER_SETTINGS
from clockwork_serve.errors import ConfigError

SHARED = ("patience", "watchdog_s", "scratch_memory")
"""Settings that stand for several fields."""


def written(folder: Path, text: str) -> str:
    """A file of settings."""
    file = folder / "settings.toml"
    file.write_text(text)
    return str(file)


def test_every_setting_of_the_table_has_its_field_and_no_other() -> None:
    fields = set(Settings.__struct_fields__) - {"sources", "warnings"}

    names = {entry.name for entry in SETTINGS}
    assert names < fields
    assert fields - names <= {*FORMER_SETTINGS}, "what is no setting any more is said"


def test_every_default_as_shown_reads_as_the_default() -> None:
    for entry in SETTINGS:
        if entry.name not in {"cache", "max_body"} and entry.shown:
            assert entry.read(entry.shown) == entry.default, entry.name


def test_with_nothing_said_all_comes_from_defaults() -> None:
    settings = read_settings({}, {}, None)

    assert settings.http_port == 8000
    assert settings.cache == default_cache({})
    assert settings.sources == {}


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = written(tmp_path, 'host = "a"\nhttp_port = 1\ngrpc_port = 2\n')
    environment = {"CLOCKWORK_HTTP_PORT": "3", "CLOCKWORK_GRPC_PORT": "4"}

    settings = read_settings({"grpc_port": "5", "http_port": None}, environment, file)

    assert (settings.host, settings.http_port, settings.grpc_port, settings.metrics_port) == ("a", 3, 5, 8002)
    assert settings.sources["host"] == file
    assert settings.sources["http_port"] == "CLOCKWORK_HTTP_PORT"
    assert settings.sources["grpc_port"] == "--grpc-port"
    assert not settings.is_set("metrics_port")


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path, "threads = 3\n")

    assert read_settings({}, {"CLOCKWORK_CONFIG": file}, None).threads == 3


def test_a_file_in_the_model_repository_is_found(tmp_path: Path) -> None:
    (tmp_path / "clockwork.toml").write_text("threads = 3\n")

    assert read_settings({"repository": str(tmp_path)}, {}, None).threads == 3
    assert read_settings({}, {"CLOCKWORK_REPOSITORY": str(tmp_path)}, None).threads == 3


def test_an_empty_variable_is_as_one_that_is_not_set() -> None:
    empty = {"CLOCKWORK_THREADS": "", "CLOCKWORK_THREAD": "", "CLOCKWORK_HANG_S": ""}
    assert read_settings({}, empty, None) == read_settings({}, {}, None)


def test_a_default_that_is_shown_as_none_may_be_written_over_another_source(tmp_path: Path) -> None:
    file = written(tmp_path, "slo_ms = 5\n")
    settings = read_settings({"slo_ms": "none"}, {}, file)
    assert (settings.slo_ms, settings.sources["slo_ms"]) == (None, "--slo-ms")
    assert ("slo_ms", "none", "--slo-ms") in settings.rows()
    with pytest.raises(ConfigError, match=r"slo_ms .*, or none, found 'off'"):
        read_settings({"slo_ms": "off"}, {}, None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "[server]\nslo_ms = 5",
            ["expected settings at the top", "found '[server]'; remove that line"],
        ),
        ("htp_port = 1", ["htp_port", "settings.toml", "a known setting", "did you mean http_port?"]),
        (
            "http_port = 70000",
            ["http_port", "settings.toml", "0 to 65535", "70000", "0 lets the system choose"],
        ),
        ("slo_ms = 0", ["slo_ms", "above 0", "found 0"]),
        ("slo_ms = nan", ["slo_ms", "above 0", "nan"]),
        ('device = ["gpu:0"]', ["device", "torch-cpu", "none of these"]),
        ('device_memory = "many"', ["device_memory", "'many'", "512MiB"]),
        ('policy = "papr"', ["policy", "one of default, paper", "did you mean paper?"]),
        ("http_port = ", ["config", "settings.toml", "valid TOML", "correct the line"]),
    ],
)
def test_a_wrong_file_names_field_source_expected_found_and_remedy(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    file = written(tmp_path, text)

    with pytest.raises(ConfigError) as caught:
        read_settings({}, {}, file)

    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_wrong_flag_and_a_wrong_variable_are_named() -> None:
    with pytest.raises(ConfigError, match=r"http_port \(from --http-port\)"):
        read_settings({"http_port": "x"}, {}, None)
    with pytest.raises(ConfigError, match=r"http_port \(from CLOCKWORK_HTTP_PORT\)"):
        read_settings({}, {"CLOCKWORK_HTTP_PORT": "x"}, None)


def test_a_file_that_is_missing_or_not_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a readable file"):
        read_settings({}, {}, str(tmp_path / "none.toml"))
    (tmp_path / "settings.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="valid TOML"):
        read_settings({}, {}, str(tmp_path / "settings.toml"))


def test_two_listeners_cannot_share_a_port_unless_the_system_chooses() -> None:
    with pytest.raises(ConfigError, match=r"grpc_port \(from --grpc-port\): expected another port than http"):
        read_settings({"grpc_port": "8000"}, {}, None)
    settings = read_settings({"http_port": "0", "grpc_port": "0", "metrics_port": "off"}, {}, None)
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (0, 0, None)


def test_one_setting_stands_for_several_limits() -> None:
    given = {"patience": "2", "watchdog_s": "0.5", "scratch_memory": "500MiB", "max_body": "100MiB"}
    found = read_settings(given, {}, None)
    times = (found.head_s, found.body_s, found.send_s, found.idle_s, found.stream_s)
    assert times == (20, 60, 60, 1200, 1200)
    assert (found.hang_s, found.hang_grace_s, found.stuck_s) == (0.5, 2.5, 1.0)
    assert (found.workspace, found.io_memory, found.max_message) == (400 << 20, 100 << 20, 100 << 20)
    assert read_settings({"watchdog_s": "0"}, {}, None).stuck_s == 0


def test_what_a_setting_stands_for_is_by_default_what_it_stands_for_when_it_is_set_to_that() -> None:
    given = {entry.name: entry.default for entry in SETTINGS if entry.name in SHARED}
    assert read_settings(given, {}, None) == msgspec.structs.replace(
        read_settings({}, {}, None), sources=read_settings(given, {}, None).sources
    )


@pytest.mark.parametrize("name", FORMER_SETTINGS)
def test_a_setting_of_an_earlier_version_names_what_to_set_now(name: str, tmp_path: Path) -> None:
    assert name not in {entry.name for entry in SETTINGS}
    file = tmp_path / "clockwork.toml"
    file.write_text(f"{name} = 1\n")
    said = re.escape(FORMER_SETTINGS[name])
    with pytest.raises(ConfigError, match=rf"{name} \(from .*clockwork.toml\): expected .*{said}"):
        read_settings({}, {}, str(file))
    with pytest.raises(ConfigError, match=rf"{name} \(from CLOCKWORK_{name.upper()}\): expected .*{said}"):
        read_settings({}, {f"CLOCKWORK_{name.upper()}": "1"}, None)


def test_all_settings_of_an_earlier_version_are_named_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "hang_s = 1\nslo_ms = 5\npin = true\n")
    with pytest.raises(ConfigError) as caught:
        read_settings({}, {"CLOCKWORK_SEED": "1"}, file)
    sources = re.findall(r"(\w+) \(from (\S+)\): expected a setting of this version", str(caught.value))
    assert sources == [("hang_s", file), ("pin", file), ("seed", "CLOCKWORK_SEED")]


def test_a_misspelt_variable_is_a_warning() -> None:
    environment = {"CLOCKWORK_HTPP_PORT": "1", "CLOCKWORK_TRACES": "x", "HOME": "/"}

    settings = read_settings({}, environment, None)

    assert settings.warnings == (
        "CLOCKWORK_HTPP_PORT: no setting has this name; did you mean CLOCKWORK_HTTP_PORT?",
    )


def service_links(service: str, port: int = 8000) -> dict[str, str]:
    """What Kubernetes sets in every pod for a Service of that name."""
    name, host = service.upper().replace("-", "_"), "10.96.0.12"
    each = f"{name}_PORT_{port}_TCP"
    return {
        f"{name}_SERVICE_HOST": host, f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_INFER": str(port), f"{name}_PORT": f"tcp://{host}:{port}",
        each: f"tcp://{host}:{port}", f"{each}_PROTO": "tcp", f"{each}_PORT": str(port), f"{each}_ADDR": host,
    }  # fmt: skip


@pytest.mark.parametrize("service", ["clockwork", "clockwork-serve", "clockwork-models-2", "clockwork-url"])
def test_variables_of_a_service_are_no_settings(service: str) -> None:
    assert read_settings({}, service_links(service), None) == read_settings({}, {}, None)


@pytest.mark.parametrize("setting", ["http_port", "grpc_port", "metrics_port"])
def test_a_service_whose_variable_is_a_setting_s_is_ignored_with_a_warning(
    setting: str, tmp_path: Path
) -> None:
    service = f"clockwork-{setting.removesuffix('_port')}"
    links = service_links(service)
    file = written(tmp_path, f"{setting} = 7001")

    assert getattr(read_settings({}, links, None), setting) == getattr(Settings(), setting)
    settings = read_settings({}, links, file)

    assert (getattr(settings, setting), settings.sources[setting]) == (7001, file)
    (warning,) = settings.warnings
    for part in (
        f"CLOCKWORK_{setting.upper()}: expected a port",
        "tcp://10.96.0.12:8000",
        service,
        "ignored",
    ):
        assert part in warning


def test_no_setting_but_a_port_can_be_taken_for_a_service_s_variable() -> None:
    for entry in SETTINGS:
        value = "tcp://10.0.0.1:1"
        warned = any("Service" in each for each in warnings_of({entry.variable: value}))
        assert warned == entry.name.endswith("_port"), entry.name


def warnings_of(environment: dict[str, str]) -> tuple[str, ...]:
    try:
        return read_settings({}, environment, None).warnings
    except ConfigError:
        return ()


def test_a_client_s_key_is_not_taken_for_the_server_s() -> None:
    settings = read_settings({}, {"CLOCKWORK_API_KEY": "secret"}, None)

    assert settings.warnings == (
        "CLOCKWORK_API_KEY: no setting has this name; did you mean CLOCKWORK_API_KEYS?",
    )


HOMELESS = """
import os
from clockwork_serve.config import read_settings
from clockwork_serve.errors import ConfigError
os.setuid(54321)
for given in ({"cache": "/c"}, {}, {"repository": "~/models", "cache": "/c"}):
    try:
        print(read_settings(given, {}, None).cache)
    except ConfigError as error:
        print(error)
try:
    read_settings({}, {}, "~/settings.toml")
except ConfigError as error:
    print(error)
"""


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only the superuser becomes somebody whom the system does not know"
)
def test_a_user_without_a_home_needs_none_or_is_told() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    command = [sys.executable, "-c", HOMELESS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    cache, none, repository, config = done.stdout.splitlines()
    assert cache == "/c"
    assert none.startswith("cache (from default): expected a path whose ~ is the home of a user, found")
    assert none.endswith("give --cache, or set HOME")
    assert "repository (from command line): expected a path whose ~ is the home of a user" in repository
    assert "config (from ~/settings.toml): expected a path whose ~" in config


def test_a_home_whose_name_is_no_text_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cache \(from default\): expected text in UTF-8.*give --cache"):
        read_settings({}, {"XDG_CACHE_HOME": "/home/\udcff"}, None)
