"""``clockwork top``: it fits the terminal, ends cleanly, and says what it cannot read."""

from __future__ import annotations

import fcntl
import http.server
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from msgspec import structs

from clockwork_serve.cli.top import frame
from clockwork_serve.telemetry import render_standby
from clockwork_serve.telemetry.top import DeviceNow, ModelNow, ServerNow
from tests.cli.commands import Cli

PAGE = """clockwork_ready 1
clockwork_models 2
clockwork_device_up{device="cpu:0"} 1
clockwork_model_queued{model="net\x1b[2J",version="1"} 3
clockwork_requests_total{outcome="ok",reason=""} 5
"""


@pytest.fixture
def url() -> Iterator[str]:
    with answering(200, PAGE) as found:
        yield found


@contextmanager
def answering(status: int, page: str) -> Iterator[str]:
    """A metrics port with that page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/metrics"
            self.send_response(status if found else 404)
            self.end_headers()
            self.wfile.write(page.encode() if found else b"")

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def now(devices: int = 2, models: int = 3) -> ServerNow:
    return ServerNow(
        seconds=1, ready=True, models=1000, models_resident=300, models_waiting=2, good_per_s=12345.6,
        received_per_s=13000, open=12, queued=7, p50_ms=20, p99_ms=None,
        ends={"rejected:would_miss_deadline": 100.0, "expired:late": 1.0},
        devices=[
            DeviceNow(
                device=f"cuda:{number}", up=number != 1, exec_busy=0.5, load_busy=1.2, pages_claimed=300,
                pages=4000, batches_per_s=123.4, not_ok_per_s=number / 2,
            )
            for number in range(devices)
        ],
        busiest=[
            ModelNow(
                model=f"a-model-with-a-name-that-is-long-{number}", version="1", good_per_s=100.5,
                refused_per_s=3, other_per_s=0, cold_per_s=0.2, queued=4,
            )
            for number in range(models)
        ],
    )  # fmt: skip


@pytest.mark.parametrize(("devices", "models"), [(0, 0), (1, 1), (8, 100), (100, 1000)])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (200, 60)])
def test_a_frame_fits_the_terminal(devices: int, models: int, width: int, height: int) -> None:
    lines = frame(now(devices, models), "http://127.0.0.1:8002", width, height)

    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)


def test_a_frame_of_80_by_24_says_it_all() -> None:
    assert frame(now(), "http://127.0.0.1:8002", 80, 24) == [
        "127.0.0.1:8002   ready   1,000 models, 300 resident, 2 to be prepared",
        "goodput 12,345.6/s   p50 <= 20 ms   p99 -   open 12   queued 7",
        "not answered well: 0.8 % (would_miss_deadline 100.0/s, expired:late 1.0/s)",
        "",
        "DEVICE            EXEC BUSY           LOAD BUSY                  PAGES BATCHES/S",
        "cuda:0            ######......   50 % ############  120 %    300/4,000     123.4",
        "cuda:1            DOWN",
        "",
        "MODEL                                 GOOD/S REFUSED/S  COLD/S  OTHER/S   QUEUED",
        "a-model-with-a-name-that-is-lo...      100.5       3.0     0.2      0.0        4",
        "a-model-with-a-name-that-is-lo...      100.5       3.0     0.2      0.0        4",
        "a-model-with-a-name-that-is-lo...      100.5       3.0     0.2      0.0        4",
    ]


def test_controllers_that_took_over_or_stand_by_are_told() -> None:
    for epoch, standbys in ((1, 1), (2, 0)):
        seen = structs.replace(now(), epoch=epoch, standbys=standbys)
        first = frame(seen, "http://127.0.0.1:8002", 120, 24)[0]
        assert first.endswith(f"2 to be prepared   epoch {epoch}, {standbys} standing by")


def test_wanted_devices_are_told() -> None:
    first = frame(structs.replace(now(), devices_wanted=3), "http://127.0.0.1:8002", 120, 24)[0]
    assert first.endswith("2 to be prepared   devices wanted 3")


def test_many_reasons_take_more_lines() -> None:
    ends = {f"rejected:reason_{number}": 1000.0 - number for number in range(30)}
    lines = frame(structs.replace(now(), ends=ends), "http://127.0.0.1:8002", 80, 24)

    assert lines[2].startswith("not answered well: 70.5 % (reason_0 1,000.0/s, reason_1 999.0/s")
    assert lines[3].startswith("reason_")
    assert lines[6].startswith("DEVICE")


def test_once_prints_one_look(url: str, cli: Cli) -> None:
    said = cli("top", "--url", url, "--once", "--interval", "0.1").out
    assert "ready   2 models" in said
    assert "cpu:0" in said
    assert "\x1b" not in said


def test_once_in_json_is_an_object(url: str, cli: Cli) -> None:
    found = cli("top", "--url", url, "--once", "--json", "--interval", "0.1").json
    assert (found["ready"], found["models"], found["busiest"][0]["queued"]) == (True, 2, 3)


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_ends_it_cleanly(url: str, *, as_json: bool) -> None:
    command = [sys.executable, "-m", "clockwork_serve", "top", "--url", url, "--interval", "0.1"]
    with subprocess.Popen(
        [*command, *(["--json"] if as_json else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)

    assert first
    assert (process.returncode, errors) == (0, "")


def test_a_server_that_is_not_there_is_told(cli: Cli) -> None:
    wrote = cli("top", "--url", "http://127.0.0.1:1", "--once", code=1)
    assert "expected a running server at http://127.0.0.1:1" in wrote.err


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (503, "no link to the controller", "the server answered 503: no link to the controller\n"),
        (404, "Not Found", "expected the port metrics_port of a server"),
    ],
)
def test_what_is_answered_instead_of_metrics_is_told(status: int, error: str, said: str, cli: Cli) -> None:
    with answering(status, f'{{"error": "{error}"}}') as url:
        assert said in cli.refused("top", "--url", url, "--once", code=1)


def test_a_controller_that_stands_by_is_no_server_to_look_at(cli: Cli) -> None:
    with answering(200, render_standby().decode()) as url:
        assert "stands by: ask the one that leads" in cli.refused("top", "--url", url, "--once", code=1)


def test_on_a_terminal_it_redraws_the_screen_and_leaves_it_as_it_was(url: str) -> None:
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "clockwork_serve", "top", "--url", url, "--interval", "0.1"]
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=env | {"TERM": "xterm"}) as process:
        os.close(its)
        seen = b""
        while seen.count(b"goodput") < 2:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # so a terminal says that nobody has it open any more
            while more := os.read(ours, 65536):
                seen += more
        assert process.wait(60) == 0
    os.close(ours)

    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l"), "the cursor is shown again"
    assert b"Traceback" not in seen
