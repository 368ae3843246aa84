"""The chart's pods as processes of this host: their command lines, an address and folders for each.

What Kubernetes does is done here by hand: paths of mounts are folders, and names of pods are addresses.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import charts
from tests.deploy.charts import Object, Pod, named

pytestmark = [pytest.mark.slow, pytest.mark.system]
WAIT_S = 150.0
SLO = {"x-slo-ms": "20000"}
BITS = {"name": "bits", "datatype": "FP32", "shape": [1, 2], "data": [0, 1]}


class Host:
    """All pods of a release, on addresses of the loopback interface that no other run uses at the time."""

    def __init__(self, objects: list[Object], folder: Path) -> None:
        self.objects = objects
        self.folder = folder
        self.shared = {"models": charts.ROOT / "examples" / "models"}
        for name in ("store", "certificates"):
            self.shared[name] = folder / name
            self.shared[name].mkdir()
        (secret,) = named(objects, "Secret").values()
        for name, content in secret["data"].items():
            (self.shared["certificates"] / name).write_bytes(base64.b64decode(content))
            (self.shared["certificates"] / name).chmod(0o440)
        self.addresses: dict[str, str] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def address(self, name: str) -> str:
        """The address of the pod of that name."""
        number = len(self.addresses) + 1
        return self.addresses.setdefault(
            name, f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}.{number}"
        )

    def start(self, pod: Pod, name: str) -> subprocess.Popen[bytes]:
        """Start a pod's process, as the pod of that name."""
        root = self.folder / name
        for mount in pod.container["volumeMounts"]:
            at = root / mount["mountPath"].lstrip("/")
            at.parent.mkdir(parents=True, exist_ok=True)
            if at.name in self.shared:
                at.symlink_to(self.shared[at.name])
            else:
                at.mkdir(exist_ok=True)
        file = charts.settings_file(pod, self.objects, self.folder)
        shutil.copy(file, root / "etc" / "clockwork" / "clockwork.toml")
        words = [self._here(word, root, self.address(name)) for word in pod.container["args"]]
        environment = {
            "PATH": os.environ["PATH"], "TMPDIR": str(root / "tmp"), "PYTHONPATH": os.pathsep.join(sys.path),
            **charts.environment_of(pod.container),
        }  # fmt: skip
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "clockwork_serve", *words],
                env=environment, cwd=root, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.running[name] = process
        return process

    def _here(self, word: str, root: Path, address: str) -> str:
        word = word.replace("$(POD_IP)", address).replace("0.0.0.0", address)
        word = word.replace(
            "--tensor-port=7100", "--tensor-port=0"
        )  # at the address of the way to a controller
        for name, other in self.addresses.items():
            word = re.sub(rf"\b{name}\.[a-z-]+(?=:7000)", other, word)
        return re.sub(r"(?:(?<==)|^)/(?=[a-z])", f"{root}/", word)

    def logs(self) -> str:
        """The last lines of all."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Wait until something is true."""
        deadline_s = time.monotonic() + WAIT_S
        while not true():
            ended = [name for name, process in self.running.items() if process.poll() not in {None, 0}]
            assert not ended, f"{ended} ended: {self.logs()}"
            assert time.monotonic() < deadline_s, f"{what}: {self.logs()}"
            time.sleep(0.1)

    def close(self) -> None:
        """Kill what runs."""
        for process in self.running.values():
            process.kill()
            process.wait()


def status(url: str, body: Any = None) -> int:
    """Of a response; 0 if there is none."""
    data = None if body is None else json.dumps(body).encode()
    with suppress(OSError, TimeoutError):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, SLO), timeout=30) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
    return 0


@pytest.fixture
def host() -> Iterator[Host]:
    values = charts.changed(charts.values_of("small"), "controller.replicas", 2)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pods-"))  # sockets want short paths
        made = Host(charts.rendered(values), Path(folder))
        stack.callback(made.close)
        yield made


def test_pods_find_each_other_serve_and_end_within_their_grace(host: Host) -> None:
    pods = {pod.role: pod for pod in charts.pods(host.objects) if pod.kind != "CronJob"}
    controllers = [f"{pods['controller'].name}-{number}" for number in range(2)]
    for name in controllers:
        host.address(name)

    assert host.start(pods["builder"], "builder").wait(WAIT_S) == 0, host.logs()
    for name in controllers:
        host.start(pods["controller"], name)
    host.start(pods["worker"], "worker")
    host.start(pods["gateway"], "gateway")

    probes = {name: f"http://{host.address(name)}:8002/v2/health/" for name in controllers}
    url = f"http://{host.address('gateway')}:8000/v2/"
    host.until(lambda: all(status(f"{at}live") == 200 for at in probes.values()), "controllers are not live")
    host.until(lambda: status(f"{url}health/ready") == 200, "the gateway is not ready")
    assert status(f"{url}models/mlp/infer", {"inputs": [BITS]}) == 200, host.logs()
    leading = [name for name, at in probes.items() if status(f"{at}ready") == 200]
    assert len(leading) == 1, "one leads, the other one stands by and is alive"

    ended = host.running[leading[0]]
    ended.send_signal(signal.SIGTERM)
    assert ended.wait(pods["controller"].spec["terminationGracePeriodSeconds"]) == 0, host.logs()
    host.until(
        lambda: status(f"{url}models/mlp/infer", {"inputs": [BITS]}) == 200, "nobody serves after a take-over"
    )
    for name, pod in (("gateway", pods["gateway"]), ("worker", pods["worker"])):
        host.running[name].send_signal(signal.SIGTERM)
        assert host.running[name].wait(pod.spec["terminationGracePeriodSeconds"]) == 0, host.logs()


def test_controllers_wait_for_the_catalogue_that_builders_write(tmp_path: Path) -> None:
    (pod,) = [
        each for each in charts.pods(charts.rendered(charts.values_of("small"))) if each.role == "controller"
    ]
    (waiting,) = pod.spec["initContainers"]
    command = [word.replace("/store", str(tmp_path)) for word in waiting["command"]]

    process = subprocess.Popen(command)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        (tmp_path / "v7-0" / "catalogue").mkdir(parents=True)
        (tmp_path / "v7-0" / "catalogue" / "000000001.json").touch()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
