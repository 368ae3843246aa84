"""The table of faults, as data: what is done, at which moment, to which set-up, and what is allowed then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from harness.server import LEADER, STANDBY
from qa.faults import acts_clients as clients
from qa.faults import acts_models as models
from qa.faults import acts_processes as processes
from qa.faults import stage
from qa.faults.stage import Act

W0, W1 = "worker-emulated:0", "worker-emulated:1"
CPU: Final = "worker-cpu:0"
SHM: Final = "/dev/shm"  # noqa: S108 - a small one of the server's own is mounted there


@dataclass(frozen=True, slots=True)
class Row:
    """One fault. ``what`` and ``when`` in words; ``act`` does it.

    ``cuts``: connections may be reset, by a killed gateway or a cut link, and refused while there is none.
    ``slow``: answers may come late and refusals after their deadline, for who would send them is stopped.
    ``whole_s``: within so long of the last thing done, goodput is at 90 % of what it was. ``idle``: nothing
    is sent while it is done. ``after_s``: how much longer than others the load goes on. ``settle_s``: within
    so long after the load nothing more is held than before. ``small``: file systems of so many bytes (the
    name "" is the cache's). ``own_cache``: it spoils the cache. ``proxy``: clients come through one.
    ``quick``: part of the short form.
    """

    name: str
    what: str
    when: str
    act: Act
    setup: str = "two"
    cuts: bool = False
    slow: bool = False
    whole_s: float = 2.0
    idle: bool = False
    after_s: float = 0.0
    settle_s: float = 5.0
    small: tuple[tuple[str, int], ...] = ()
    own_cache: bool = False
    proxy: bool = False
    quick: bool = False


WORKERS: Final = (
    Row("nothing", "nothing", "under load", processes.nothing, quick=True),
    Row("worker-kill-idle", "worker SIGKILL", "idle", processes.killed(W0), idle=True),
    Row("worker-kill-load", "worker SIGKILL", "during LOAD", processes.at_work("load"), "swap", quick=True),
    Row("worker-kill-infer", "worker SIGKILL", "during INFER", processes.at_work("exec"), "long", quick=True),
    Row("worker-kill-only", "worker SIGKILL", "the only one, ONNX, 1 GiB", processes.killed(CPU), "large",
        quick=True),
    Row("worker-kill-start", "worker SIGKILL, its successor too", "during start", processes.newborn(W0, 0.15),
        quick=True),
    Row("worker-kill-start-3", "worker SIGKILL, three successors too", "during start",
        processes.newborn(W0, 0.15, 3), after_s=2, whole_s=4),
    Row("worker-kill-profile", "profiler SIGKILL", "a new model is measured", models.profiler_killed, "real",
        after_s=4),
    Row("worker-kill-twice", "one worker SIGKILL, 100 ms later the other", "under load",
        processes.killed(W0, W1, apart_s=0.1)),
    Row("worker-kill-both", "both workers SIGKILL", "during INFER", processes.at_work("exec", both=True),
        "long", quick=True),
    Row("worker-kill-every", "worker SIGKILL every 5 s, in turns", "under load",
        processes.every(5.0, lambda stage: stage.workers(), 6, 1)),
    Row("worker-stop-50ms", "worker SIGSTOP for 50 ms", "under load", processes.stopped(W0, 0.05)),
    Row("worker-stop-1s", "worker SIGSTOP for 1 s", "under load", processes.stopped(W0, 1.0), quick=True),
    Row("worker-stop", "worker SIGSTOP for good", "under load", processes.stopped(W0, None), quick=True,
        after_s=2, whole_s=4, settle_s=15),  # it counts as hung after 2 s, and is ended after 10 s more
    Row("worker-half", "worker at half its speed for 6 s, ONNX", "under load",
        processes.slowed(CPU, 0.5, 6.0), "real2"),
    Row("worker-slow", "worker at a tenth of its speed for 6 s, ONNX", "under load",
        processes.slowed(CPU, 0.9, 6.0), "real2", quick=True),
    Row("worker-term", "worker SIGTERM", "under load", processes.killed(W0, number=processes.TERM)),
)  # fmt: skip
MODELS: Final = (
    Row("model-loops", "a Python model loops for ever", "during INFER", models.stuck_then(stage.LOOPS),
        "real2", after_s=2, settle_s=15),
    Row("model-sleeps", "a Python model sleeps for ever", "during INFER", models.stuck_then(stage.SLEEPS),
        "real2", after_s=2, settle_s=15, quick=True),
    Row("model-native", "a Python model sleeps for ever in native code and keeps the GIL", "during INFER",
        models.stuck_then(stage.KEEPS_THE_GIL), "real2", after_s=2, settle_s=15),
    Row("model-raises", "a Python model raises, 20 times", "during INFER", models.asked(stage.RAISES, 20),
        "real2"),
    Row("model-exits", "a Python model ends its process", "during INFER", models.asked(stage.EXITS), "real2",
        whole_s=4),
    Row("model-segfaults", "a Python model reads at address 0, four times", "during INFER",
        models.asked(stage.SEGFAULTS, 4, pause_s=1.0), "real2", whole_s=5, after_s=3, quick=True),
    Row("model-eats", "a Python model takes memory until it is refused", "during INFER",
        models.asked(stage.EATS_MEMORY), "real2"),
    Row("models-churn", "models loaded, replaced, unloaded", "under load", models.churn, "real", after_s=6,
        whole_s=3),
    Row("models-bad", "three bad models loaded", "under load", models.bad_models_loaded, "real", after_s=6,
        whole_s=3),
)  # fmt: skip
CORE: Final = (
    Row("controller-kill-idle", "controller SIGKILL", "idle", processes.killed("controller"), idle=True),
    Row("controller-kill", "controller SIGKILL", "under load", processes.killed("controller"), quick=True),
    Row("controller-kill-every", "controller SIGKILL every 5 s", "under load",
        processes.every(5.0, lambda stage: ["controller"], 4, 1)),
    Row("controller-kill-start", "worker SIGKILL, then controller", "during the worker's start",
        processes.newborn(W0, 0.15, victim="controller")),
    Row("controller-kill-only", "controller SIGKILL", "one worker, ONNX", processes.killed("controller"),
        "real"),
    Row("controller-stop-100ms", "controller SIGSTOP for 100 ms", "under load",
        processes.stopped("controller", 0.1)),
    Row("controller-stop-1s", "controller SIGSTOP for 1 s", "under load",
        processes.stopped("controller", 1.0), quick=True),
    Row("controller-stop", "controller SIGSTOP for good", "under load",
        processes.stuck("controller"), after_s=3, whole_s=5, quick=True),
    Row("standby-kill", "leading controller SIGKILL", "another stands by", processes.killed(LEADER),
        "standby", quick=True),
    Row("standby-kill-every", "leading controller SIGKILL every 5 s", "another stands by",
        processes.every(5.0, lambda stage: [LEADER], 4, 1), "standby"),
    Row("standby-stop", "leading controller SIGSTOP for good", "another stands by", processes.stuck(LEADER),
        "standby", after_s=3, whole_s=5),
    Row("standby-kill-other", "controller that stands by SIGKILL", "under load", processes.killed(STANDBY),
        "standby"),
    Row("standby-kill-both", "both controllers SIGKILL", "at once", processes.killed(STANDBY, LEADER),
        "standby"),
    Row("observer-kill", "observer SIGKILL", "under load",
        processes.explained_after(processes.killed("observer"))),
    Row("observer-stop", "observer SIGSTOP for good", "under load",
        processes.explained_after(processes.stuck("observer")), quick=True),
    Row("observer-slow", "both cores wanted by others of niceness 19 for 6 s", "under load",
        processes.explained_after(processes.hog(6.0, niceness=19))),
    Row("gateway-kill-idle", "gateway SIGKILL", "idle", processes.killed("gateway-0"), cuts=True, idle=True),
    Row("gateway-kill", "gateway SIGKILL", "mid-request", clients.at_once("gateway-0"), cuts=True,
        quick=True),
    Row("gateway-kill-body", "gateway SIGKILL", "large bodies half read", clients.body_half_read, cuts=True),
    Row("gateway-kill-every", "gateways SIGKILL every 5 s, two in turns", "under load",
        processes.every(5.0, lambda stage: ["gateway-0", "gateway-1"], 6, 1), "gateways", cuts=True),
    Row("gateway-stop-100ms", "gateway SIGSTOP for 100 ms", "under load",
        processes.stopped("gateway-0", 0.1)),
    Row("gateway-stop-1s", "gateway SIGSTOP for 1 s", "under load", processes.stopped("gateway-0", 1.0),
        slow=True),
    Row("gateway-stop", "gateway SIGSTOP for good", "under load", processes.stuck("gateway-0"),
        cuts=True, slow=True, after_s=3, whole_s=5, quick=True),
    Row("gateway-stop-2", "one of two gateways SIGSTOP for good", "under load",
        processes.stuck("gateway-1"), "gateways", cuts=True, slow=True, after_s=3, whole_s=5),
    Row("keeper-kill", "keeper SIGKILL, then started again", "under load", processes.supervisor_killed,
        cuts=True, after_s=3, whole_s=6),
    Row("keeper-stop-1s", "keeper SIGSTOP for 1 s", "under load", processes.stopped("keeper", 1.0)),
    Row("two-worker-controller", "worker and controller SIGKILL", "at once",
        processes.killed(W0, "controller")),
    Row("two-gateway-controller", "gateway and controller SIGKILL", "at once",
        processes.killed("gateway-0", "controller"), cuts=True),
    Row("two-gateway-worker", "one of two gateways and a worker SIGKILL", "at once",
        processes.killed("gateway-1", W0), "gateways", cuts=True),
    Row("all-but-keeper", "all processes but the keeper SIGKILL", "at once",
        processes.killed("gateway-0", "controller", W0, W1), cuts=True, whole_s=3),
)  # fmt: skip
WORLD: Final = (
    Row("file-truncated", "a served model's file cut short", "under load",
        models.file_of_a_model("truncated"), "real", after_s=3),
    Row("file-removed", "a served model's folder removed", "under load", models.file_of_a_model("removed"),
        "real", after_s=3),
    Row("file-replaced", "a served model's file replaced, and loaded", "under load",
        models.file_of_a_model("replaced"), "real", after_s=3),
    Row("cache-removed", "the cache removed while weights are loaded from it", "under load",
        models.cache_removed, "realswap", own_cache=True, quick=True),
    Row("cache-full", "the cache's file system full", "a model is loaded", models.full(""), "real",
        small=(("", 24 << 20),), own_cache=True, after_s=4),
    Row("file-limit", "RLIMIT_FSIZE 4 KiB", "a model is loaded", models.no_large_files, "real",
        own_cache=True, after_s=4),
    Row("shm-full", f"{SHM} full", "under load", models.full(SHM), "real", small=((SHM, 4 << 20),)),
    Row("no-descriptors", "RLIMIT_NOFILE reached in the gateway", "under load", clients.no_descriptors),
    Row("client-vanishes-request", "clients vanish", "mid-request", clients.vanish(0.5)),
    Row("client-vanishes-answer", "clients vanish", "mid-answer", clients.vanish(1.0, 0.002)),
    Row("client-resets-answer", "clients reset", "mid-answer", clients.vanish(1.0, 0.002, reset=True)),
    Row("slowloris", "200 connections, a byte at a time", "under load", clients.slowloris),
    Row("unread", "clients that do not read", "under load", clients.reading_stops),
    Row("reset-storm", "connections reset as they stand", "under load", clients.storm, slow=True),
    Row("header-bombs", "header and gzip bombs", "under load", clients.attacks(*clients.HEADER_BOMBS)),
    Row("hostile-http", "hostile requests of all kinds", "under load", clients.attacks(*clients.ANY),
        quick=True),
    Row("flood", "3,000 silent connections", "under load", clients.flood(3000), slow=True),
    Row("link-cut", "the link to clients cut, three times", "under load", clients.link_cut, cuts=True,
        proxy=True),
    Row("clock-step", "CLOCK_REALTIME stepped an hour ahead and back", "under load", processes.clock_stepped),
    Row("cpu-stolen", "both cores wanted by others for 5 s", "under load", processes.hog(5.0), slow=True,
        after_s=3),
    Row("page-cache", "the model files out of the page cache", "under load", processes.page_cache_dropped,
        "realswap"),
)  # fmt: skip
ROWS: Final[dict[str, Row]] = {row.name: row for row in (*WORKERS, *MODELS, *CORE, *WORLD)}
