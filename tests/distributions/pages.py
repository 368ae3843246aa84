"""The code blocks of README and of the pages for users and operators, and a shell that runs their commands.

A block of ``sh`` is what is typed in one terminal, one of ``console`` what is typed after ``$`` and what came
then; a page's blocks are run in their order, in one folder. Blocks without a word are shown and not run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (
    "README.md",
    *(
        str(path.relative_to(ROOT))
        for folder in ("use", "operate")
        for path in sorted(ROOT.glob(f"docs/{folder}/*.md"))
    ),
)
PROGRAMS: Final = (
    "clockwork", "curl", "pip", "make", "perf_analyzer", "grpcurl", "grpc_health_probe", "chrt", "python",
    "docker", "podman", "kubectl", "helm", "kind", "prometheus", "promtool", "ray",
)  # fmt: skip
"""Each is a function of the shell, which decides whether and how to run it."""
ELSEWHERE: Final = {
    "pip install *": "needs a package index; the environment of the test is what it makes",
    "python -m comparison.*": "in a checkout; hours",
    "make setup": "the same, in a checkout",
    "make demo*": "the same; fetches 200 MB",
    "make test*": "the same; this is one of its tests",
    "make hostile*": "in a checkout; ten minutes",
    "clockwork serve models --device *": "needs torch, and a compiler or a GPU",
    "clockwork validate --self-test *": "the same; tests/apps/test_self_test.py runs it",
    "clockwork bench *": "of clockwork-lab; on a busy machine a run is INVALID, as it should be",
    "clockwork demo*": "of clockwork-lab; fetches 200 MB",
    "clockwork reproduce *": "of clockwork-lab; takes minutes",
    "clockwork ray *": "needs Ray, which is large; tests/qa/test_engine.py runs it",
    "ray *": "a program of others",
    "perf_analyzer *": "a program of others, for some machines only; tests/end_to_end/stock runs it",
    "grpcurl *": "a program of others",
    "grpc_health_probe *": "a program of others",
    "prometheus *": "a program of others; tests/end_to_end/test_monitoring.py runs it",
    "promtool *": "likewise; tests/examples/test_monitoring.py",
    "docker build *": "needs a container engine",
    "kind *": "likewise",
    "kubectl *": "needs a cluster",
    "helm *": "likewise; tests/deploy renders what it would install",
}
"""Commands that are not run here, as patterns of the shell, and why."""
_FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_PROMPT = "$ "
_SHELL = r"""
set -eu
trap 'stop_all > /dev/null' EXIT
children=()

stop_all() {
  local child
  for child in ${children[@]+"${children[@]}"}; do kill -TERM "$child" 2> /dev/null || true; done
  for child in ${children[@]+"${children[@]}"}; do
    wait "$child" || { echo "a server that was stopped ended with $?" >&2; return 1; }
  done
  children=()
}

run() {
  case "$*" in
    @ELSEWHERE@
    "clockwork serve "* | "chrt "*) stop_all; start '^ready: ' "$@" ;;
    "clockwork controller "*) stop_all; start '^leads:\|^stands by, ' "$@" ;;
    "clockwork worker "*) start 'joined with' "$@" ;;
    "clockwork gateway "*) start '^  metrics' env CLOCKWORK_{HTTP,GRPC,METRICS}_PORT=0 "$@" ;;
    "clockwork live "*) start '^open ' "$@" ;;
    "clockwork key "*) key "$@" ;;
    "curl "*) patiently "$@" ;;
    *) command "$@" ;;
  esac
}

start() {
  local ready="$1" log="$TMPDIR/log-${#children[@]}-$RANDOM"
  shift
  command "$@" > "$log" 2>&1 &
  children+=($!)
  until grep -q "$ready" "$log"; do
    kill -0 $! 2> /dev/null || { cat "$log" >&2; return 1; }
    sleep 0.1
  done
  cat "$log"
}

key() {  # the first that is made is the reader's own
  command "$@" 2> "$TMPDIR/key"
  : "${KEY:=$(sed 's/.*: //' "$TMPDIR/key")}"
}

patiently() {  # a busy machine refuses what is asked with little time
  local tries
  for tries in {1..60}; do
    if command curl --fail-with-body "${@:2}" > "$TMPDIR/answer"; then cat "$TMPDIR/answer"; return; fi
    sleep 0.5
  done
  cat "$TMPDIR/answer" >&2
  return 1
}
"""


class Block(NamedTuple):
    """A block of commands: its page, its first line there, whether it shows output, and its lines."""

    page: str
    line: int
    console: bool
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The page's blocks of commands."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        if found[2] in {"sh", "console"}:
            yield Block(page, text.count("\n", 0, found.start()) + 2, found[2] == "console", found[3])


def unfenced(page: str) -> list[str]:
    """Lines that look like commands and are in no block of commands."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    start = "|".join(map(re.escape, PROGRAMS))
    before = r"(?: {4}|\t)(?:\$ )?(?:\w+=\S* )*(?:\.venv/bin/)?"
    return re.findall(rf"^{before}(?:{start}) .*$", text, re.MULTILINE)


def steps(block: Block) -> Iterator[tuple[str, str]]:
    """Of a block of ``console``: each command, and the output that is shown."""
    command, output = "", ""
    for line in block.text.splitlines():
        if line.startswith(_PROMPT):
            if command:
                yield command, output
            command, output = line.removeprefix(_PROMPT), ""
        elif not _whole(command):
            command += f"\n{line}"
        else:
            output += f"{line}\n"
    yield command, output


def _whole(command: str) -> bool:
    """Whether no quote is open, and no line goes on."""
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return not command.endswith("\\")


def script(found: Sequence[Block], before: str, ports: Mapping[str, int]) -> str:
    """A script of bash that runs a page's commands, after others.

    ``ports`` stand for those that the page names, and this machine for every other. It wants a folder of its
    own, ``TMPDIR``, and writes to ``out-LINE-NUMBER`` there what a command of a block of ``console`` prints.
    """
    cases = "\n    ".join(f"""{pattern.replace(" ", chr(92) + " ")}) ;;""" for pattern in ELSEWHERE)
    lines = [_SHELL.replace("@ELSEWHERE@", cases)]
    lines += [f'{name}() {{ run {name} "$@"; }}' for name in PROGRAMS]
    lines += [before, "set -v"]
    for block in found:
        lines.append(f": {block.page}:{block.line}")
        if not block.console:
            lines.append(block.text)
            continue
        for number, (command, _) in enumerate(steps(block)):
            lines.append(f'{{ {command}\n}} > "$TMPDIR/out-{block.line}-{number}"')
    text = "\n".join([*lines, "set +v", "stop_all", ""])
    text = re.sub(r"\b(?:10\.0\.0\.\d|0\.0\.0\.0)\b", "127.0.0.1", text)
    return re.sub(r"(?<=:)\d{4}\b", lambda port: str(ports.get(port[0], port[0])), text)
