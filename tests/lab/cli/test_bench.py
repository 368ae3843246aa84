"""``clockwork bench`` from its command line to its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clockwork_lab.bench.records import read_records
from clockwork_lab.bench.run import LoadSample
from clockwork_lab.cli.bench import bench
from clockwork_lab.cli.bench_screen import panel
from tests.cli.commands import Cli
from tests.lab.bench.loads import CLOSED, STEADY, written
from tests.lab.bench.scripted import scripted

LAX = ("--max-lateness-ms", "60000", "--drain", "10")


def test_one_screen_tells_all_and_files_hold_the_same(tmp_path: Path, cli: Cli) -> None:
    files = [str(tmp_path / name) for name in ("out.json", "out.record")]
    with scripted(lambda number, model: (429, "queue_full") if number % 4 == 0 else "ok") as played:
        reports = ("--json", files[0], "--record", files[1])
        said = cli("bench", written(tmp_path), "--url", played.url, *LAX, *reports)
    assert "75.000\N{NO-BREAK SPACE}%" in said.out
    assert "429 queue_full" in said.out
    assert "steady: 1 s" in said.out
    assert "offered" in said.err
    found = json.loads(Path(files[0]).read_bytes())
    assert (found["total"]["good"], found["total"]["rejected"]) == (75, 25)
    head, records = read_records(Path(files[1]))
    assert (head.models, records.table.size) == (("m",), 100)
    assert np.count_nonzero(records.table["end"] == 1) == 75


def test_json_on_standard_output_is_all_there_is(tmp_path: Path, cli: Cli) -> None:
    with scripted() as played:
        said = cli("bench", written(tmp_path), "--url", played.url, *LAX, "--json", "-")
    assert said.json["total"]["good"] == 100
    assert said.err == ""


def test_a_generator_that_was_late_says_invalid_and_fails(tmp_path: Path, cli: Cli) -> None:
    with scripted(lambda number, model: ("ok", 0.05)) as played:
        said = cli("bench", written(tmp_path), "--url", played.url, "--connections", "1", "--quiet", code=1)
    assert "INVALID: the load generator sent its requests late: p99" in said.out
    assert "raise --connections" in said.out
    assert "goodput" in said.out
    assert said.err == ""


@pytest.mark.parametrize("text", [STEADY, CLOSED])
def test_interrupted_it_drains_and_shows_what_was_measured(tmp_path: Path, text: str) -> None:
    text = text.replace("seconds = 1", "seconds = 1000")
    with scripted(lambda number, model: ("ok", 0.1)) as played:
        child = subprocess.Popen(
            [sys.executable, "-m", "clockwork_serve", "bench", written(tmp_path, text), "--url", played.url,
             "--json", str(tmp_path / "out.json"), *LAX],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert child.stderr is not None
        while "good" not in (line := child.stderr.readline()) or "/1000 s: 0 r/s" in line:
            assert line
        # As a terminal does it: to the whole group. Senders are not in it.
        os.killpg(child.pid, signal.SIGINT)
        shown, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "CUT after" in shown
    found = json.loads((tmp_path / "out.json").read_bytes())
    assert found["cut"]
    assert found["total"]["offered"] == found["total"]["good"] == sum(played.done.values())
    assert found["measured_s"] < 100


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "Missing option '--url'"),
        (("--url", "127.0.0.1"), 2, "url: expected http://HOST:PORT"),
        (("--url", "h:1", "--protocol", "udp"), 2, "'udp' is not one of 'http', 'grpc', 'raw'"),
        (("--url", "h:1", "--protocol", "raw"), 2, "path: expected a path such as /predict/{model}"),
        (("--url", "h:1", "--path", "/x"), 2, "path: expected none with --protocol http, found '/x'"),
        (("--url", "h:1", "--body", "x"), 2, "body: expected none with --protocol http"),
        (("--url", "h:1", "--deadline", "grpc"), 2, "deadline: expected header, timeout or none"),
        (("--url", "h:1", "--protocol", "raw", "--path", "/x", "--deadline", "grpc"), 2, "header or none"),
        (("--url", "h:1", "--header", "no colon"), 2, "header: expected NAME: VALUE"),
        (("--url", "h:1", "--header", "a: b\r\nc: d"), 2, "header: expected NAME: VALUE"),
        (("--url", "h:1", "--map", "a"), 2, "map: expected MODEL=NAME, found 'a'"),
        (("--url", "h:1", "--cores", "a"), 2, "cores: expected numbers of cores as 2,3"),
        (("--url", "h:1", "--processes", "0"), 2, "0 is not in the range"),
        (("--url", "h:1", "--api-key-file", "nowhere"), 2, "api_key_file: expected a file that holds"),
        (("--url", "h:1", "--json", "nowhere/x"), 2, "json: expected a file in a folder that exists"),
        (("--url", "h:1", "--record", "nowhere/x"), 2, "record: expected a file in a folder that exists"),
        (("--url", "h:1", "--trace-dir", "nowhere"), 2, "trace_dir: expected a folder of trace files"),
        (("--url", "h:1", "--duration", "-1"), 2, "-1.0 is not in the range"),
        (("--url", "grpcs://h:1", "--protocol", "grpc", "--ca", "nowhere"), 2, "ca: expected a file of"),
        (("--url", "https://h:1", "--cert", "nowhere"), 2, "cert: expected a certificate and its key in PEM"),
        (("--url", "https://h:1", "--key", "nowhere"), 2, "key: expected --cert beside it, found none"),
        (("--url", "127.0.0.1:1"), 1, "url: expected a server at http://127.0.0.1:1, found none"),
        (("--url", "nowhere.invalid:1"), 1, "url: expected a server at http://nowhere.invalid:1, found none"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, said: str, cli: Cli
) -> None:
    assert said in cli.refused("bench", written(tmp_path), *arguments, code=code)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--models", "x"), "does not have x; say which of its models stand for them: --models or --map"),
        (("--map", "n=m"), "map: expected a model of the scenario before '=', found 'n'; known: m"),
        (("--shape", "x:1,5"), "shape: expected [-1, 4] for input 'x' of model 'm', found [1, 5] in --shape"),
        (("--shape", "x"), "shape: expected [MODEL:]INPUT:1,3,224,224, found 'x'"),
        (("--input-data", "none.npy"), "input_data: expected random, zeros, or a file"),
        (("--rate-scale", "1000000"), "rate_scale: 1000000 makes loads[0].rate_rps"),
        (("--protocol", "raw", "--path", "/x", "--body", "none"), "body: expected random:BYTES or a file"),
        (("--ca", "none.pem"), "ca: expected an https or grpcs URL beside it"),
        (("--cert", "none.pem"), "cert: expected an https or grpcs URL beside it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_server_is_said_before_any_load(
    tmp_path: Path, arguments: tuple[str, ...], said: str, cli: Cli
) -> None:
    with scripted() as played:
        wrote = cli("bench", written(tmp_path), "--url", played.url, "--quiet", *LAX, *arguments, code=2)
    assert said in wrote.err
    assert played.asked == 0


def test_the_page_names_every_option() -> None:
    page = (Path(__file__).parents[3] / "docs" / "use" / "bench.md").read_text()
    options = [option for parameter in bench.params for option in parameter.opts if option[:2] == "--"]
    assert [option for option in options if f"{option}" not in page] == []


def test_a_bad_scenario_is_named_with_its_line(tmp_path: Path, cli: Cli) -> None:
    file = written(tmp_path, STEADY.replace("rate_rps", "rate_rsp"))
    wrote = cli("bench", file, "--url", "h:1", code=2)
    assert "scenario.toml:13: loads[0].rate_rsp: expected a known field" in wrote.err


def test_an_api_key_goes_with_every_request_and_into_no_report(tmp_path: Path, cli: Cli) -> None:
    key = tmp_path / "key"
    key.write_text("secret-key\n")
    with scripted() as played:
        options = ("--api-key-file", key, "--quiet", *LAX, "--json", tmp_path / "out.json")
        cli("bench", written(tmp_path), "--url", played.url, *options)
    assert all(b"\r\nAuthorization: Bearer secret-key\r\n" in head for head in played.heads)
    assert "secret-key" not in (tmp_path / "out.json").read_text()


def test_the_live_screen_says_how_it_goes() -> None:
    moment = LoadSample(
        at_s=12.5, seconds=60, warming=False, stopping=False, asked=25_000, out=12, good=24_000, late=88,
        others={"rejected": 900}, reasons={"429 queue_full": 900}, asked_rps=2000.0, good_rps=1920.0,
        p50_ms=4.5, p99_ms=48.25, lateness_p99_ms=0.125, bars=(0.0, 0.5, 1.0),
    )  # fmt: skip
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the process
    console.print(panel("zipf to http://h:1", moment))
    shown = console.export_text()
    for text in (
        "12.5 of 60 s",
        "2,000 r/s",
        "12 out",
        "1,920 r/s",
        "88",
        "900 429 queue_full",
        "48.25 ms",
        "0.12 ms",
        "▄█",
    ):
        assert text in shown
    console.file.close()
