"""Controllers on several hosts: one leads, all of its processes die or stop, and the next one goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clockwork_serve.serve.lease import REIGN_S, fingerprints
from harness.hosts import Host, Machine
from harness.ports import free_port
from harness.process_tree import descendants
from harness.serving import Metrics, read_metrics, total, until
from tests.end_to_end.machines import another_build
from tests.end_to_end.steady import how, steady
from tests.mounts import with_read_only
from tests.serve.certificates import Certificates, certificates, renewed_certificates
from tests.serve.onnx_models import affine, put
from tests.serve.proxy import proxy
from tests.timing import Timing

pytestmark = [pytest.mark.system, pytest.mark.slow]

MODELS = ("m0", "m1")
HERE = Host("127.0.0.1")
LEASE_S = 1.0
KILLED_MS, STOPPED_MS = 500, 1500
DESERTED_S = 4.0
REFUSED = {"503", "UNAVAILABLE"}
PATIENCE_S = 60.0


@dataclass
class Cluster:
    """Two controllers with one store, and a gateway and a worker that may join either."""

    folder: Path
    files: Certificates
    ports: tuple[int, int]
    stack: ExitStack
    controllers: dict[int, Machine] = field(default_factory=dict)
    """By port; all that run."""
    metrics: dict[int, str] = field(default_factory=dict)
    http_port: int = 0
    grpc_port: int = 0
    worker: Machine = None  # type: ignore[assignment]
    gateway: Machine = None  # type: ignore[assignment]
    host: Host = HERE
    """Where the next machine is."""
    lease: tuple[str, ...] = ("--lease-s", str(LEASE_S))
    ways: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By command: other ports by which those that it starts reach the controllers."""

    def machine(self, name: str, *words: str) -> Machine:
        found = Machine(self.host, words, self.folder / f"{name}.log")
        self.stack.callback(found.close)
        return found

    def start(self, port: int) -> None:
        """A controller there."""
        files = self.files
        made = self.machine(
            f"controller-{port}", "controller", "--store", str(self.folder / "store"),
            "--listen-machines", f"127.0.0.1:{port}", *self.lease, "--metrics-port", "0",
            "--cache", str(self.folder / f"cache-{port}"), "--cluster-certificate", files.certificate,
            "--cluster-key", files.key, "--cluster-ca", files.ca, "--json",
        )  # fmt: skip
        self.controllers[port] = made
        self.metrics[port] = made.facts()["metrics"]

    def joining(self, command: str, name: str = "far") -> list[str]:
        at = ",".join(f"127.0.0.1:{port}" for port in self.ways.get(command, self.ports))
        return [
            command, "--controller", at, "--machine-name", name,
            "--cluster-certificate", self.files.client_certificate,
            "--cluster-key", self.files.client_key, "--cluster-ca", self.files.ca,
        ]  # fmt: skip

    def start_worker(self, name: str) -> None:
        """A worker; the one before is left to its caller."""
        self.worker = self.machine(
            f"worker-{name}", *self.joining("worker", name), "--store", str(self.folder / "store"),
            "--cache", str(self.folder / "far"), "--device-memory", "16MiB",
        )  # fmt: skip

    def start_gateway(self, name: str) -> None:
        """A gateway that serves; likewise."""
        ports = [f"--{which}-port=0" for which in ("http", "grpc", "metrics")]
        self.gateway = self.machine(f"gateway-{name}", *self.joining("gateway", name), *ports, "--json")
        facts = self.gateway.facts()
        self.http_port, self.grpc_port = (int(facts[at].rpartition(":")[2]) for at in ("http", "grpc"))
        self.whole()
        until("the gateway serves", lambda: _ready(facts["http"]), PATIENCE_S)

    def seen(self, port: int) -> Metrics:
        """The metrics of a controller; one of one that stands by, none of one that is not there."""
        try:
            return read_metrics(self.metrics[port], 5)
        except OSError:
            return {}

    @property
    def leader(self) -> int:
        """The port of the controller that leads and is ready; 0 for none."""
        ready = [port for port in self.controllers if total(self.seen(port), "clockwork_ready")]
        return ready[0] if len(ready) == 1 else 0

    def whole(self, epoch: int = 0) -> int:
        """The port of one that leads, once the other one stands by."""

        def found() -> int:
            leader = self.leader
            metrics = self.seen(leader) if leader else {}
            there = total(metrics, "clockwork_controllers_standing_by") == len(self.controllers) - 1
            later = total(metrics, "clockwork_controller_epoch") >= epoch
            return leader if metrics and there and later else 0

        port: int = until("one leads, and the other one stands by", found, PATIENCE_S)
        return port

    def epoch(self) -> int:
        return round(total(self.seen(self.leader), "clockwork_controller_epoch"))


def build(folder: Path) -> None:
    """Have a builder put the models into the store."""
    words = f"profile {folder}/models --store {folder}/store --cache {folder}/built".split()
    command = [sys.executable, "-m", "clockwork_serve", *words]
    subprocess.run(command, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a store that has the models."""
    made = tmp_path_factory.mktemp("cluster")
    for at, name in enumerate(MODELS):
        put(made / "models", name, affine(at))
    (made / "store").mkdir()
    build(made)
    return made


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(folder, certificates(folder), (free_port(), free_port()), stack)
        for port in made.ports:
            made.start(port)
        made.start_worker("far")
        made.start_gateway("far")
        yield made


def _ready(url: str, what: str = "ready") -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/{what}", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_an_engine_finds_one_that_stands_by_alive_and_not_ready(cluster: Cluster) -> None:
    leader = cluster.whole()
    (other,) = set(cluster.ports) - {leader}
    at = {port: cluster.metrics[port].removesuffix("/metrics") for port in cluster.ports}
    assert (_ready(at[leader], "live"), _ready(at[leader])) == (True, True)
    assert (_ready(at[other], "live"), _ready(at[other])) == (True, False)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{at[other]}/v2/health/ready", timeout=5)
    why = refused.value.read().decode()
    assert f"this controller stands by; the one at 127.0.0.1:{leader} leads, with epoch" in why
    assert total(cluster.seen(other), "clockwork_standing_by") == 1
    assert total(cluster.seen(leader), "clockwork_standing_by") == 0


@pytest.mark.parametrize("how_it_ends", ["killed", "stopped", "asked to end"])
def test_the_leader_s_host_ends_and_every_request_is_answered(
    cluster: Cluster, how_it_ends: str, timing: Timing
) -> None:
    leader = cluster.whole()
    epoch, worker = cluster.epoch(), set(descendants(cluster.worker.process.pid))
    dead = cluster.controllers[leader]
    with steady(cluster.http_port, cluster.grpc_port, MODELS) as load:
        time.sleep(1.0)
        gone_s = time.monotonic()
        if how_it_ends == "killed":
            dead.kill()
        elif how_it_ends == "stopped":
            dead.signal(signal.SIGSTOP)
        else:
            dead.process.terminate()
        if how_it_ends != "stopped":
            del cluster.controllers[leader]
        (other,) = set(cluster.ports) - {leader}

        def led_by_the_other() -> bool:
            found = cluster.seen(other)
            return (
                bool(total(found, "clockwork_ready")) and total(found, "clockwork_controller_epoch") > epoch
            )

        until("the other one leads", led_by_the_other, PATIENCE_S)
        found = cluster.seen(other)
        assert total(found, "clockwork_model_cold_starts_total") == 0, "nobody waited for weights"
        time.sleep(1.0)
        if how_it_ends == "stopped":
            dead.signal(signal.SIGCONT)  # it does not know yet that it was deposed
        else:
            dead.close()
            cluster.start(leader)
        leads = cluster.whole(epoch + 1)
        time.sleep(0.5)
        ends = load.stop()
    assert {end.how for end in ends if not end.good} <= REFUSED, how(ends)
    assert set(descendants(cluster.worker.process.pid)) == worker
    with timing.judged():
        assert (leads, cluster.epoch()) == (other, epoch + 1), "it was never late for its lease"
        assert not how(ends), "what could wait waited"
        first_s = min(end.ended_s for end in ends if end.sent_s > gone_s)
        assert (first_s - gone_s) * 1e3 < (STOPPED_MS if how_it_ends == "stopped" else KILLED_MS)
    assert total(cluster.seen(other), "clockwork_answers_unmatched_total") == 0


def test_one_that_stands_by_has_what_a_builder_added(cluster: Cluster) -> None:
    leader = cluster.whole()
    (other,) = set(cluster.ports) - {leader}
    put(cluster.folder / "models", "late", affine(9))
    build(cluster.folder)
    until("it is known", lambda: "with 3 models" in cluster.controllers[other].said, PATIENCE_S)
    cluster.controllers.pop(leader).kill()
    until("the other one leads", lambda: cluster.leader == other, PATIENCE_S)
    with steady(cluster.http_port, cluster.grpc_port, ("late",)) as load:
        until("it is served", lambda: any(end.good for end in load.ends), PATIENCE_S)
    blobs = list((cluster.folder / "far").glob("*/weights/*/*.bin"))
    assert len(blobs) == len(MODELS) + 1, "the worker took them from the store"
    cluster.start(leader)  # for the tests that come after


def test_each_role_is_upgraded_by_a_protocol_under_load_and_no_request_is_lost(
    cluster: Cluster, tmp_path: Path, timing: Timing
) -> None:
    leader = cluster.whole()
    cluster.host = Host("127.0.0.1", another_build(tmp_path, 1))
    with steady(cluster.http_port, cluster.grpc_port, MODELS) as load:
        for port in sorted(cluster.ports, key=lambda port: port == leader):  # who leads, last: it hands over
            cluster.controllers.pop(port).close()
            cluster.start(port)
            cluster.whole()
        old = cluster.worker
        cluster.start_worker("next")

        def there() -> float:
            return total(cluster.seen(cluster.leader), "clockwork_device_up", device="next.cpu:0")

        until("it is there", there, PATIENCE_S)
        old.close()
        answered = len(load.ends)
        until("it serves", lambda: len(load.ends) > answered + 100, PATIENCE_S)
        old = cluster.gateway
        cluster.start_gateway("next")
        with steady(cluster.http_port, cluster.grpc_port, MODELS) as moved:
            ends = load.stop()
            old.close()
            time.sleep(0.5)
            ends += moved.stop()
    for machine in (*cluster.controllers.values(), cluster.worker, cluster.gateway):
        assert "of clockwork-serve" not in machine.said, "all understand each other"
    with timing.judged():
        assert not how(ends)


def test_a_leader_that_loses_all_workers_lets_another_one_lead_that_they_reach(
    folder: Path, timing: Timing
) -> None:
    with ExitStack() as stack:
        made = Cluster(folder, certificates(folder), (free_port(), free_port()), stack)
        ways = {port: stack.enter_context(proxy(port)) for port in made.ports}
        made.ways = {"worker": tuple(way.port for way in ways.values())}
        made.lease = (*made.lease, "--lease", "deserted")
        for port in made.ports:
            made.start(port)
        made.start_worker("far")
        made.start_gateway("far")
        leader, epoch = made.whole(), made.epoch()
        (other,) = set(made.ports) - {leader}
        time.sleep(REIGN_S)
        ways[leader].cut(back=False)
        cut_s = time.monotonic()
        until("the other one serves", lambda: made.leader == other, PATIENCE_S)
        with timing.judged():
            assert time.monotonic() - cut_s < DESERTED_S
            assert made.epoch() == epoch + 1
        assert "no worker is connected any more" in made.controllers[leader].said
        ways[leader].heal()
        made.whole()

        made.worker.close()
        until("nobody is ready", lambda: not made.leader, PATIENCE_S)
        time.sleep(2 * REIGN_S)  # they lead in turns, ever longer
        made.start_worker("next")
        until("one serves again", lambda: made.leader, PATIENCE_S)
        with timing.judged():
            assert made.epoch() <= epoch + 4, "each leads twice as long as the one before"


def ended(folder: Path, files: Certificates, *lease: str, begin: Sequence[str] = ()) -> tuple[int, str]:
    """The exit status and the last line of one more controller with that store."""
    command = [
        *begin, sys.executable, "-m", "clockwork_serve", "controller", "--store", f"{folder}/store",
        "--listen-machines", f"127.0.0.1:{free_port()}", "--cache", f"{folder}/cache-more",
        "--metrics-port", "0", "--cluster-certificate", files.certificate, "--cluster-key", files.key,
        "--cluster-ca", files.ca, *lease,
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return found.returncode, found.stderr.splitlines()[-1]


@pytest.mark.parametrize("lease", ["main", "of its own"], ids=["stands by", "would lead"])
def test_a_store_that_is_read_only_ends_a_controller_with_what_to_do(cluster: Cluster, lease: str) -> None:
    cluster.whole()
    begin, name = with_read_only(cluster.folder / "store"), lease.replace(" ", "-")
    status, said = ended(cluster.folder, cluster.files, "--lease", name, begin=begin)
    assert status == 2
    assert said.startswith("error: store: expected one that this process may write")
    assert "Read-only file system" in said and "give it the right, or name another one" in said


def test_a_controller_of_another_server_with_the_same_lease_ends_and_names_both(
    cluster: Cluster, tmp_path: Path
) -> None:
    leader, epoch = cluster.whole(), cluster.epoch()
    files = renewed_certificates(tmp_path)
    status, said = ended(cluster.folder, files)
    assert status == 2
    (ours,), (theirs,) = fingerprints(cluster.files.ca), fingerprints(files.ca)
    for part in (f"has the fingerprint {theirs}", f"127.0.0.1:{leader} leads", ours, "--lease NAME"):
        assert part in said
    assert (cluster.whole(), cluster.epoch()) == (leader, epoch)
    (other,) = set(cluster.ports) - {leader}
    assert f"stands by: the controller at 127.0.0.1:{leader} leads" in cluster.controllers[other].said
