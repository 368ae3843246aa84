"""Acts on the machine: cores taken away, files out of the page cache, a stepped clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from qa.faults.stage import NotMeasured, Stage

MAY_STEP_CLOCK = "CLOCKWORK_MAY_STEP_CLOCK"
"""Set by whoever owns the machine alone: everything on it sees the step."""


def hog(stage: Stage) -> None:
    """A program on each core that wants all of it."""
    cores = sorted(os.sched_getaffinity(0))
    code = "import os,sys\nos.sched_setaffinity(0,{int(sys.argv[1])})\nwhile True: pass"
    stage.mark()
    hogs = [subprocess.Popen([sys.executable, "-c", code, str(core)]) for core in cores]
    try:
        stage.sleep(2.0 if stage.short else 5.0)
    finally:
        for each in hogs:
            each.kill()
            each.wait()
    stage.mark()


def page_cache_dropped(stage: Stage) -> None:
    """The files of repository and cache, which must be read from the disk again."""
    for _ in range(3):
        stage.mark()
        for folder in (stage.root, stage.cache):
            for path in folder.rglob("*"):
                if path.is_file():
                    _drop(path)
        stage.sleep(0.3)


def _drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def clock_stepped(stage: Stage) -> None:
    """CLOCK_REALTIME an hour ahead, and back."""
    if not os.environ.get(MAY_STEP_CLOCK):
        raise NotMeasured(f"it steps the whole machine's clock: set {MAY_STEP_CLOCK}=1 to allow it")
    for seconds in (3600, -3600):
        now = time.clock_gettime(time.CLOCK_REALTIME)
        stage.mark()
        try:
            time.clock_settime(time.CLOCK_REALTIME, now + seconds)
        except PermissionError as error:
            raise NotMeasured(f"the clock may not be set here ({error.strerror})") from None
        stage.sleep(0.5)


def nothing(stage: Stage) -> None:
    """What the measuring itself costs."""
    stage.mark()
