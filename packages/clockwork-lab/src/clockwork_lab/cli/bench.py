"""``clockwork bench``: sends a scenario's requests to a running server. Implemented by ``bench``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clockwork_serve.cli.options import STDOUT, output_option, seed_option, traces_option, write_output
from clockwork_serve.cli.screen import INTERRUPTED, interruptible, note, say, show_table
from clockwork_serve.errors import ConfigError

if TYPE_CHECKING:
    from clockwork_lab.bench.plan import Options
    from clockwork_lab.bench.report import BenchReport

INVALID = 1
_HEADER = re.compile(r"(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(?P<value>[\x20-\x7e]*)")


@click.command()
@click.argument("scenario", metavar="SCENARIO")
@click.option("--url", required=True, metavar="URL", help="The server: http://HOST:PORT, or HOST:PORT.")
@click.option(
    "--protocol", type=click.Choice(["http", "grpc", "raw"]), default="http",
    help="Open Inference Protocol over http or grpc; raw: POST to --path. [default: http]",
)  # fmt: skip
@click.option("--models", metavar="A,B,...", help="Models of the server for those of the scenario, in turn.")
@click.option(
    "--map", "renamed", multiple=True, metavar="MODEL=NAME",
    help="The server's name of a model or of a set of copies; {i} in it is a copy's number.",
)  # fmt: skip
@click.option(
    "--input-data", metavar="FILE|zeros|random", default="random", help="Values of inputs. [default: random]"
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="[MODEL:]INPUT:1,3,...",
    help="Sizes that an input leaves open.",
)
@click.option(
    "--path", metavar="PATH", default="", help="raw: where to POST; {model} in it is the model's name."
)
@click.option("--body", metavar="FILE|random:BYTES", default="", help="raw: what to POST.")
@click.option("--header", "headers", multiple=True, metavar="K:V", help="A header of every request.")
@click.option("--api-key-file", metavar="FILE", help="File that holds the API key, sent as a bearer token.")
@click.option("--ca", metavar="FILE", help="Certificates to trust for TLS. [default: the system's]")
@click.option("--cert", metavar="FILE", help="Client certificate, for a server that requires one.")
@click.option("--key", metavar="FILE", help="Its key, if it is in another file.")
@click.option(
    "--deadline", type=click.Choice(["header", "timeout", "grpc", "none"]),
    help="How deadlines are sent: x-slo-ms, Triton's parameter, gRPC's. [default: header; grpc; raw: none]",
)  # fmt: skip
@click.option("--abandon", is_flag=True, help="Cancel a request at its deadline.")
@seed_option
@click.option(
    "--duration",
    "seconds",
    type=click.FloatRange(0.01, 1e8),
    metavar="SECONDS",
    help="End earlier than the scenario.",
)
@click.option(
    "--rate-scale",
    type=click.FloatRange(1e-6, 1e6),
    default=1.0,
    metavar="X",
    help="Open loads at X times their rates.",
)
@click.option(
    "--processes", type=click.IntRange(1, 256), default=1, metavar="N", help="Sending processes. [default: 1]"
)
@click.option(
    "--connections", type=click.IntRange(1, 65_000), metavar="N",
    help="At most, of all processes together. [default: 1024; grpc: 8]",
)  # fmt: skip
@click.option("--cores", metavar="N,N,...", help="Cores of the sending processes, in turn.")
@click.option(
    "--realtime", is_flag=True, help="Run sending processes at real-time priority; needs privileges."
)
@click.option(
    "--drain", "drain_s", type=click.FloatRange(0, 1e5), default=10.0, metavar="SECONDS",
    help="How long to wait for responses after the last request. [default: 10]",
)  # fmt: skip
@click.option(
    "--max-lateness-ms", type=click.FloatRange(0.001, 1e6), default=1.0, metavar="MS",
    help="A run is invalid if the generator itself sent its requests later than this (p99). [default: 1]",
)  # fmt: skip
@traces_option
@output_option("json", "Write the numbers as JSON to FILE; - is standard output.")
@output_option("record", "Write the outcome of every request to FILE.")
@click.option("--quiet", is_flag=True, help="Show nothing while it runs.")
def bench(
    *, scenario: str, json_file: str | None, record_file: str | None, quiet: bool,
    **given: Any,
) -> int:  # fmt: skip
    """Send the requests of SCENARIO to a server and report which responses came in time.

    Latency counts from when a request was due, even if the server or this program was busy then. Exit codes:
    0; 1 if the run is INVALID because requests were sent late; 130 after Ctrl-C, with what was measured.
    """
    from clockwork_lab.bench.plan import make_plan
    from clockwork_lab.bench.run import run, write
    from clockwork_lab.cli.bench_screen import bench_screen

    plan = make_plan(scenario, _options(given))
    title = f"{plan.scenario.name} to {plan.address}"
    with bench_screen(title, quiet=quiet or json_file == STDOUT) as show, interruptible() as stopped:
        ran = run(plan, show=show, stopped=stopped)
    made = ran.report
    if json_file != STDOUT:
        _show(made)
    write_output(json_file, made.to_json())
    if record_file is not None:
        write(plan, ran, Path(record_file))
        note(f"wrote {record_file}")
    if not made.valid and json_file == STDOUT:
        note(f"INVALID: {made.invalid}")
    return INTERRUPTED if made.cut else 0 if made.valid else INVALID


def _options(given: dict[str, Any]) -> Options:
    """The command line as options of the load generator. Raises :class:`ConfigError`."""
    from clockwork_lab.bench.plan import Options

    headers = [_header(text) for text in given.pop("headers")]
    key_file = given.pop("api_key_file")
    if key_file is not None:
        headers.append(("Authorization", f"Bearer {_key(key_file)}"))
    _check_protocol(given)
    renamed = {}
    for text in given.pop("renamed"):
        model, equals, name = text.partition("=")
        if not model or not equals or not name:
            raise ConfigError(f"map: expected MODEL=NAME, found {text!r}; correct it")
        renamed[model] = name
    models = given.pop("models")
    cores = given.pop("cores")
    try:
        chosen = tuple(int(core) for core in cores.split(",")) if cores else ()
    except ValueError:
        raise ConfigError(f"cores: expected numbers of cores as 2,3, found {cores!r}; correct it") from None
    return Options(
        **given, headers=tuple(headers), renamed=renamed, cores=chosen,
        models=tuple(name.strip() for name in models.split(",") if name.strip()) if models else (),
    )  # fmt: skip


def _check_protocol(given: dict[str, Any]) -> None:
    """Refuse options that have no meaning for the protocol."""
    protocol, deadline = given["protocol"], given["deadline"]
    if protocol == "raw":
        if not given["path"].startswith("/"):
            raise ConfigError(
                f"path: expected a path such as /predict/{{model}}, found {given['path']!r}; give --path"
            )
        if deadline in ("timeout", "grpc"):
            raise ConfigError(
                f"deadline: expected header or none with --protocol raw, found {deadline}; change one"
            )
    else:
        for name in ("path", "body"):
            if given[name]:
                raise ConfigError(
                    f"{name}: expected none with --protocol {protocol}, found {given[name]!r}; remove it"
                )
        if deadline == "grpc" and protocol == "http":
            raise ConfigError("deadline: expected header, timeout or none with --protocol http, found grpc")


def _header(text: str) -> tuple[str, str]:
    found = _HEADER.fullmatch(text)
    if found is None:
        raise ConfigError(f"header: expected NAME: VALUE in visible ASCII, found {text!r}; correct it")
    return found["name"], found["value"].strip()


def _key(file: str) -> str:
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise ConfigError(f"api_key_file: expected a file that holds one key in visible ASCII, found {file}")
    return key


def _show(made: BenchReport) -> None:
    from clockwork_lab.bench.report import (
        COLUMNS,
        REASON_COLUMNS,
        closing_lines,
        group_rows,
        reason_rows,
        setup_lines,
        worst_models,
    )

    for line in setup_lines(made):
        say(line)
    say("")
    show_table(
        ("load", *COLUMNS[1:]), group_rows([*made.loads, *([made.total] if len(made.loads) > 1 else [])])
    )
    if len(made.slos) > 1:
        show_table(("SLO", *COLUMNS[1:]), group_rows(made.slos))
    if len(made.models) > 1:
        shown = worst_models(made)
        of = "" if len(shown) == len(made.models) else f", the worst {len(shown)} of {len(made.models)}"
        show_table((f"model{of}", *COLUMNS[1:]), group_rows(shown))
    if made.reasons:
        show_table(REASON_COLUMNS, reason_rows(made))
    for line in closing_lines(made):
        say(line)
