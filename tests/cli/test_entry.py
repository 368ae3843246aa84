"""How the command line as a whole behaves: help, errors, ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

from clockwork_serve import __version__
from clockwork_serve.cli.entry import clockwork
from clockwork_serve.cli.serve import serve
from clockwork_serve.config.former import FORMER_COMMANDS, FORMER_OPTIONS
from tests.cli.commands import Cli

HEAVY = ("asyncio", "grpc", "numpy", "onnx", "onnxruntime", "rich", "uvloop")


def test_help_imports_nothing_heavy() -> None:
    script = f"""
import sys
from clockwork_serve.cli.entry import run
assert run(["--help"]) == 0
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""

    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert ended.stdout.splitlines()[-1] == "heavy: []"


def test_every_command_explains_itself(cli: Cli) -> None:
    for name in clockwork.list_commands(click.Context(clockwork)):
        assert "Usage: clockwork" in cli(name, "--help").out


@pytest.mark.parametrize(("name", "instead"), FORMER_COMMANDS.items())
def test_a_command_of_an_earlier_version_says_what_does_its_work_now(
    cli: Cli, name: str, instead: str
) -> None:
    assert instead in cli.refused(name, "some.journal", "--json", "-")


@pytest.mark.parametrize(("option", "instead"), FORMER_OPTIONS.items())
def test_an_option_of_an_earlier_version_does_so_too(cli: Cli, option: str, instead: str) -> None:
    command, name = option.split()

    assert instead in cli.refused(command, "steady.toml", name, "page")


def test_all_settings_of_an_earlier_version_are_named_at_once(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOCKWORK_REALTIME", "1")
    said = cli.refused("serve", "models", "--hang-s", "2", "--no-pin", "--stuck-s=3", "--slo-ms=5")
    assert [
        part for part in ("--hang-s", "--no-pin", "--stuck-s", "CLOCKWORK_REALTIME") if part not in said
    ] == []
    assert "--seed" not in cli.refused("simulate", "steady.toml", "--seed", "2", "--hang-s", "2")


def clockwork_lab_help(name: str) -> str:
    """The first words of the help of a command of clockwork-lab."""
    command = getattr(import_module(f"clockwork_lab.cli.{name}"), name)
    return str(command.help).splitlines()[0].rstrip(".").partition(" (")[0]


WITHOUT_ENTRY_POINTS = """
import importlib.metadata, sys
importlib.metadata.entry_points = lambda **_: ()
from clockwork_serve.cli.entry import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [(["demo", "--seconds", "5"], "[demo]"), (["bench", "steady"], ""), (["reproduce", "fig5"], "[figures]")],
)
def test_where_the_laboratory_is_not_installed_its_commands_say_what_to_install(
    arguments: list[str], extra: str
) -> None:
    command = [sys.executable, "-c", WITHOUT_ENTRY_POINTS]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    helped, its_own = (
        " ".join(
            subprocess.run([*command, *words], capture_output=True, text=True, check=True).stdout.split()
        )
        for words in (["--help"], [*arguments, "--help"])
    )

    assert ended.returncode == 2
    assert ended.stderr.endswith(f"pip install './packages/clockwork-lab{extra}'\n")
    assert ended.stderr.startswith(f"error: {arguments[0]}: expected clockwork-lab")
    assert f"Not installed: pip install './packages/clockwork-lab{extra}', in a" in helped
    assert clockwork_lab_help(arguments[0]) in its_own
    assert f"pip install './packages/clockwork-lab{extra}'" in its_own


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise OSError('no disk')", "found OSError: no disk; install other-package again"),
        ("hello = 7", "expected 'other:hello' to be a click.Command; found 7"),
    ],
)
def test_a_command_of_another_package_that_is_broken_breaks_nothing_else(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "other.py").write_text(text)
    metadata = tmp_path / "other_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[clockwork_serve.commands]\nhello = other:hello\n")
    command = [sys.executable, "-m", "clockwork_serve"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))}

    helped, given = (
        subprocess.run([*command, word], env=environment, capture_output=True, text=True, check=False)
        for word in ("--help", "hello")
    )

    assert helped.returncode == 0
    assert re.search(r"^  hello +Cannot be loaded\.$", helped.stdout, re.MULTILINE)
    assert given.returncode == 2
    assert said in given.stderr


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"clockwork {__version__}\n"


@pytest.mark.parametrize(("given", "found"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "3"}, "3")])
def test_numpy_has_one_thread_unless_told_otherwise(given: dict[str, str], found: str) -> None:
    code = """
import os
from clockwork_serve.cli import main
try:
    main(["--version"])
finally:
    print(os.environ["OPENBLAS_NUM_THREADS"])
"""
    others = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=others | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == found


def test_alone_it_shows_its_help(cli: Cli) -> None:
    assert "serve" in cli(code=2).out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serv"], "Did you mean 'serve'? See clockwork --help"),
        (["serve", "--devize", "cpu"], "See clockwork serve --help"),
        (["serve"], "expected the folder of a model repository, found none"),
        (
            ["serve", "x", "--http-port", "80a"],
            "http_port (from --http-port): expected a port from 0 to 65535",
        ),
        (["serve", "x", "--device", "cuda:99"], "device cuda:99: expected"),
        (["serve", "x", "--slo-ms", "-5"], "slo_ms (from --slo-ms): expected a number above 0"),
        (
            ["serve", "x", "--config", "/nowhere.toml"],
            "config (from /nowhere.toml): expected a readable file",
        ),
        (["serve", "x", "--slo-ms"], "'--slo-ms' requires an argument. See clockwork serve --help"),
        (["models", "list", "--url"], "'--url' requires an argument. See clockwork models list --help"),
        (
            ["serve", "x", "--slo-ms", "1e9"],
            "expected a number above 0 and up to 3600000, or none, found '1e9'",
        ),
        (["serve", "x", "--device", "gpu"], "or emulated:PROFILE, found 'gpu'; "),
        (["models", "load"], "Missing argument 'MODEL'. See clockwork models load --help"),
    ],
)
def test_misuse_is_one_line_that_says_what_to_do(
    arguments: list[str], said: str, repository: Path, cli: Cli
) -> None:
    assert said in cli.refused(*arguments)


def test_a_misspelt_variable_is_mentioned(
    repository: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv("CLOCKWORK_HTPP_PORT", "80")

    assert "warning: CLOCKWORK_HTPP_PORT: no setting has this name" in cli("validate", repository).err


def test_ctrl_c_ends_it_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        command = [sys.executable, "-m", "clockwork_serve", "models", "--url", url, "list"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            deaf.settimeout(60)
            connection, _ = deaf.accept()
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=60)
            connection.close()

    assert child.returncode == 130
    assert said.strip() == "interrupted"


def test_a_reader_that_went_away_is_no_traceback(repository: Path) -> None:
    command = [sys.executable, "-m", "clockwork_serve", "serve", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        said = child.stderr.read()
        child.wait(timeout=60)

    assert said == ""
    assert child.returncode == 1


@pytest.mark.parametrize("command", ["serve", "gateway", "worker"])
def test_help_all_shows_every_setting_that_the_command_takes(command: str, cli: Cli) -> None:
    taken = clockwork.commands[command].params
    hidden = {one.opts[0] for one in taken if isinstance(one, click.Option) and one.hidden}
    assert hidden

    for _ in range(2):
        usual = {*re.findall(r"--[a-z][\w-]*", cli(command, "--help").out)}
        assert "--help-all" in usual
        assert not hidden & usual
        assert hidden | usual <= {*re.findall(r"--[a-z][\w-]*", cli(command, "--help-all").out)}


def test_help_shows_what_kind_of_value_each_setting_takes() -> None:
    kinds = {
        "max_body": "SIZE", "scratch_memory": "SIZE", "device_memory": "SIZE",
        "compile_memory": "SIZE", "shared_memory": "PREFIX", "patience": "N", "gateways": "N", "slo_ms": "MS",
        "drain_s": "SECONDS", "http_port": "PORT", "tls_key": "FILE", "cache": "FOLDER", "policy": "NAME",
    }  # fmt: skip

    assert {one.name: one.metavar for one in serve.params if one.name in kinds} == kinds
