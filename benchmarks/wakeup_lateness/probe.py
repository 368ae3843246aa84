"""A process that only sleeps and wakes up: how late this machine, under this load, wakes a sleeping process.

It sleeps and wakes as the controller does (uvloop, timerfd), every millisecond or so, without any work.

    python -m benchmarks.wakeup_lateness.probe SECONDS

writes a histogram of its lateness as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import uvloop

from clockwork_serve.serve.driver import LoopTimer
from clockwork_serve.telemetry import Histogram

ROOT = Path(__file__).parents[2]


class Probe:
    """The process, as the benchmark that starts it sees it."""

    def __init__(self, seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.wakeup_lateness.probe", str(seconds)],
            stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid

    def result(self) -> Histogram:
        """Wait for its end."""
        output, _ = self._process.communicate()
        return msgspec.json.decode(output, type=Histogram)


async def probe(seconds: float) -> Histogram:
    """Wake every 0.5 to 1.5 ms, never in step with anything, for so long."""
    found, over, dice = Histogram(), asyncio.Event(), random.Random(1)
    end_ns = time.monotonic_ns() + round(seconds * 1e9)
    asked_ns = 0

    def sleep(now_ns: int) -> None:
        nonlocal asked_ns
        asked_ns = now_ns + dice.randrange(500_000, 1_500_000)
        timer.arm(asked_ns)

    def woke() -> None:
        now_ns = time.monotonic_ns()
        found.add(now_ns - asked_ns)
        if now_ns > end_ns:
            over.set()
        else:
            sleep(now_ns)

    timer = LoopTimer(woke)
    sleep(time.monotonic_ns())
    await over.wait()
    timer.close()
    return found


def main() -> int:
    """Run it for as long as ``argv[1]`` says."""
    gc.collect()
    gc.freeze()
    found = uvloop.run(probe(float(sys.argv[1])))
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
