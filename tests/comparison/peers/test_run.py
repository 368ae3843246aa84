"""What is measured in which order, what is kept, and what is shown of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from comparison.peers import table
from comparison.peers.install import licence
from comparison.peers.loads import LOADS
from comparison.peers.measure import Failed, Point
from comparison.peers.run import (
    chosen,
    done,
    points,
    result_path,
    unshare_command,
    why_not_isolated,
    write_result,
)
from harness import report
from harness.launch import adopt
from harness.process_tree import Server, cpu_s, pss_bytes


def measured(server: str = "ray_serve", in_time: float = 10.0, **more: Any) -> dict[str, Any]:
    figures = {
        "in_time_per_s": in_time, "in_time_share": 0.5, "asked_per_s": 20.0, "asked": 100, "p50_ms": 1.0,
        "p99_ms": None, "no_p99_ms": 2.0, "late": 0, "none": 0,
    }  # fmt: skip
    return {
        "status": "measured", "server": server, "load": "gpu_one", "repeat": 1, "figures": figures,
        "cpu_ms_per_request": 1.5, "pss_bytes": 1 << 20, "others_share": 0.01, "noise": [], **more,
    }  # fmt: skip


def test_servers_take_turns_and_each_repeat_begins_with_another() -> None:
    x, y = (LOADS[name] for name in ("gpu_one", "mobilenet_one"))
    order = [(one.load, one.server, one.repeat) for one in points(["a", "b"], [x, y], 2)]

    assert order == [
        (x, "a", 1), (x, "b", 1), (y, "a", 1), (y, "b", 1),
        (x, "b", 2), (x, "a", 2), (y, "b", 2), (y, "a", 2),
    ]  # fmt: skip


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path: Path) -> None:
    path = result_path(tmp_path, Point("ray_serve", LOADS["gpu_one"], 2))
    assert path == tmp_path / "results" / "gpu_one" / "ray_serve-2.json"
    assert not done(path)
    for status, is_done in (("failed", False), ("left out", True), ("measured", True)):
        write_result(path, {"status": status})
        assert done(path) is is_done
    path.write_text('{"status": "measu')
    assert not done(path)


def test_what_others_disturbed_is_done_again_if_that_is_wanted(tmp_path: Path) -> None:
    write_result(tmp_path / "a.json", measured(noise=["others used 20%"]))

    assert done(tmp_path / "a.json")
    assert not done(tmp_path / "a.json", again_noisy=True)


def test_an_unknown_load_is_named() -> None:
    with pytest.raises(Failed, match="found nosuch"):
        chosen(Namespace(servers=["ray_serve"], loads="nosuch", short=False))


def test_a_table_shows_medians_and_who_was_not_measured() -> None:
    found = [
        measured(in_time=1.0), measured(in_time=3.0), measured(in_time=2.0, noise=["others"]),
        measured("triton", 9.0),
        {"status": "failed", "server": "fastapi_ort", "load": "gpu_one", "why": "it ended\nlong"},
    ]  # fmt: skip
    facts = {"machine": "a machine", "servers": {}}
    text = table.markdown(table.summarised(found), facts)
    lines = [line for line in text.splitlines() if line.startswith("| ")]

    assert lines[2].startswith("| triton | 1 | 9.0 |")
    assert lines[3].startswith("| ray_serve | 3, 1 disturbed | 2.0 (1.0 to 3.0) | 50.0 |")
    assert "fastapi_ort: not measured: it ended" in text
    assert "| fastapi_ort" not in text


def test_loads_are_those_that_were_called_for_or_that_requests_caused() -> None:
    comers = {"in_time_per_s": 20.0, "late": 10, "asked": 100, "asked_per_s": 25.0}
    asked = measured()
    asked["figures"]["by_load"] = {"comers": comers}

    assert table.loads_per_s(measured()) is None
    assert table.loads_per_s(measured(loads=500, seconds=20.0)) == 25
    assert table.loads_per_s(asked) == 22.5


def test_tables_are_written_beside_the_results_and_into_a_page(tmp_path: Path) -> None:
    write_result(tmp_path / "results" / "gpu_one" / "ray_serve-1.json", measured())
    told = {
        "version": "1", "onnxruntime": "2", "licence": "MIT", "configured": "well", "source": "https://x",
        "note": "slow",
    }  # fmt: skip
    (tmp_path / "facts.json").write_text(json.dumps({"machine": "m", "servers": {"ray_serve": told}}))
    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*report.MARKS))
    table.write(tmp_path, page)

    assert "old" not in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    assert "| ray_serve | 1 | 2 | MIT | [well](https://x) | slow |" in page.read_text()
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["loads"]["gpu_one"]["ray_serve"]["columns"]["in_time_per_s"]["median"] == 10


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("License-Expression", "MIT"), ("License", "other")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: BSD License")], "BSD License"),
        ([("License", "Apache 2.0\nand much text")], "Apache 2.0"),
        ([], "not said"),
    ],
)
def test_a_licence_is_what_the_wheel_says(fields: list[tuple[str, str]], expected: str) -> None:
    told = Message()
    for name, value in fields:
        told.add_header(name, value)

    assert licence(told) == expected


ORPHANS = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    open(sys.argv[1], "w").write(str(os.getpid()))
    time.sleep(60)
time.sleep(60)
"""


def test_a_server_ends_with_all_that_it_started_even_orphans(tmp_path: Path) -> None:
    adopt()
    told = tmp_path / "pid"
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    core = min(os.sched_getaffinity(0))
    server = Server([sys.executable, "-c", ORPHANS, str(told)], dict(os.environ), tmp_path / "log", core)
    try:
        end_s = time.monotonic() + 20
        while not (told.is_file() and told.read_text()) and time.monotonic() < end_s:
            time.sleep(0.02)
        orphan = int(told.read_text())
        tree = server.tree()
        assert orphan in tree
        assert bystander.pid not in tree
        assert os.sched_getaffinity(orphan) == {core}
        assert pss_bytes(tree) > 0
        assert cpu_s(tree) >= 0
    finally:
        server.stop(5)

    assert not Path(f"/proc/{orphan}").exists()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


ROOT = Path(__file__).parents[3]
WHY_NOT = why_not_isolated(unshare_command())
INSIDE = """
import json, os, socket
from comparison.peers.run import isolate
os.environ["PEERS_ISOLATED"] = "1"
assert isolate() == ""
with socket.create_server(("0.0.0.0", 0)) as server, socket.create_connection(server.getsockname()):
    print(json.dumps([name for _, name in socket.if_nameindex()]))
"""


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it can be made")
def test_there_is_loopback_and_it_works() -> None:
    command = [*unshare_command(), sys.executable, "-c", INSIDE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)

    assert "lo" in json.loads(done.stdout)
    assert not {"eth0", "docker0"} & {*json.loads(done.stdout)}


def test_where_there_can_be_none_it_says_why() -> None:
    assert "no program unshare" in why_not_isolated([])
    assert "no network namespace can be made" in why_not_isolated(["false"])
