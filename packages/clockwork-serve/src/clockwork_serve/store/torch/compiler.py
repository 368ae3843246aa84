"""Compiles torch programs into code and weights; torch itself is imported in a separate process only.

What an architecture compiles to is stored by the text of its graph. For each further copy only a blob is made
from the file, by the recipe that was verified on the first.
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from clockwork_serve.messages import Code, TorchIndex
from clockwork_serve.store.cache import Cache, Compiled, batch_sizes, compiled_of, digest_of
from clockwork_serve.store.onnx.graph import specs
from clockwork_serve.store.settings import ModelSettings, ProblemError, StoreConfig, problem
from clockwork_serve.store.torch.archive import Archive, read_archive, refuse, write_archive
from clockwork_serve.store.torch.plan import (
    OPTIONS,
    CompileJob,
    CompileReport,
    CompileStep,
    TorchPlan,
    planned,
)
from clockwork_serve.store.torch.program import BlobRecipe, Bytes, Program, read_program
from clockwork_serve.store.torch.target import resolved, torch_version
from clockwork_serve.units import KIB

OnStep = Callable[[str], None]  # called with the current step of a compilation

_LINE_MAX = 64 * KIB
_LINES_KEPT = 20
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}  # fmt: skip
"""torch on a CPU takes thousands of page faults a run without these, which a device sets too."""


class TorchArchitecture(Struct, frozen=True, kw_only=True):
    """What copies of one program share: all but the id of their weights."""

    first: Compiled


class TorchCompiler:
    """Compiles files one by one. ``runs`` counts the programs that had to be compiled.

    ``sizes_of`` gives the batch sizes to try for a ``max_batch_size``.
    """

    def __init__(self, cache: Cache, config: StoreConfig) -> None:
        self.runs = 0
        self.sizes_of: Callable[[int], tuple[int, ...]] = batch_sizes
        self._cache = cache
        self._config = config
        self._lock = threading.Lock()
        self._target = ""

    def place(self) -> bytes:
        """What an artefact depends on beside its model: the version of torch and the target."""
        return f"{torch_version()} {self.target}".encode()

    @property
    def target(self) -> str:
        """The target to compile for. Raises ``ProblemError`` if this machine has none."""
        with self._lock:
            self._target = self._target or resolved(self._config.torch_target)
        if not self._target:
            raise problem(
                "device", expected="a device that runs torch programs", found="none",
                advice="give --device torch-cpu or cuda:0",
            )  # fmt: skip
        return self._target

    def compile(self, path: Path, settings: ModelSettings, on_step: OnStep) -> Compiled:
        """Code and weights of a program, stored unless present. Raises ``ProblemError``."""
        place = self.place()
        archive = read_archive(path)
        program = read_program(archive)
        plan = planned(program, settings, self._config, self.sizes_of)
        key = digest_of(
            "torch", self._cache.runtime, place, program.text, msgspec.json.encode((plan, OPTIONS)),
            settings.compile_key(self._config),
        )  # fmt: skip
        known = self._known(key)
        if known is None:
            with self._cache.lock(key):
                known = self._known(key)
                if known is None:
                    return self._first(archive, program, plan, settings, key, on_step)
        recipe = self._recipe(known.first.code_id)
        if recipe is None:  # damaged since it was found
            with self._cache.lock(key):
                return self._first(archive, program, plan, settings, key, on_step)
        return msgspec.structs.replace(
            known.first, weights_id=self._cache.save_weights(_blob(archive, program, recipe))
        )

    def _known(self, key: str) -> TorchArchitecture | None:
        known = self._cache.record("architectures", key, TorchArchitecture)
        return known if known is not None and self._cache.code(known.first.code_id) is not None else None

    def _recipe(self, code_id: str) -> BlobRecipe | None:
        stored = self._cache.code_file(code_id, "recipe.json")
        return None if stored is None else msgspec.json.decode(stored, type=BlobRecipe)

    def _first(
        self, archive: Archive, program: Program, plan: TorchPlan, settings: ModelSettings, key: str,
        on_step: OnStep,
    ) -> Compiled:  # fmt: skip
        folder = self._cache.scratch()
        try:
            report, files = self._made(archive, plan, folder, on_step)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        code = _code(key[:32], plan, report)
        recipe = msgspec.json.decode(files["recipe.json"], type=BlobRecipe)
        index = TorchIndex(
            tensors=recipe.tensors, blob_bytes=recipe.blob_bytes, torch_version=torch_version(),
            target=self.target, inputs=tuple(spec.name for spec in code.inputs),
            outputs=tuple(spec.name for spec in code.outputs),
        )  # fmt: skip
        files |= {
            "index.json": msgspec.json.encode(index),
            "probe.json": msgspec.json.encode(report.fills),
            "report.json": msgspec.json.encode(report),
        }
        self._cache.save_code(code, files)
        with self._lock:
            self.runs += 1
        blob = _blob(archive, program, recipe)
        compiled = compiled_of(
            code, self._cache.save_weights(blob), len(blob), settings,
            max_batch_size=plan.max_batch_size if code.batched else 0,
            warnings=(plan.lost, report.lost),
        )  # fmt: skip
        self._cache.save_record("architectures", key, TorchArchitecture(first=compiled))
        return compiled

    def _made(
        self, archive: Archive, plan: TorchPlan, folder: Path, on_step: OnStep
    ) -> tuple[CompileReport, dict[str, bytes]]:
        """Packages and recipe, made by a process of its own."""
        write_archive(archive, folder / "program.pt2")
        (folder / "made").mkdir()
        job = CompileJob(
            program=str(folder / "program.pt2"), folder=str(folder / "made"), plan=plan, target=self.target
        )
        (folder / "job.json").write_bytes(msgspec.json.encode(job))
        # Whoever has one for several caches compiles torch's headers once, which takes as long as a model.
        inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or self._cache.root / "inductor")
        report = _run(folder / "job.json", self.target, inductor, on_step)
        if report.problem is not None:
            raise ProblemError(report.problem)
        return report, {each.name: each.read_bytes() for each in (folder / "made").iterdir()}


def _code(code_id: str, plan: TorchPlan, report: CompileReport) -> Code:
    batched = plan.batched and not report.lost
    return Code(
        code_id=code_id, backend="torch", path="",
        inputs=specs(plan.inputs_of(batched=batched), batched=batched),
        outputs=specs(report.outputs, batched=batched), batched=batched, batch_sizes=report.batch_sizes,
        lifted=True,
    )  # fmt: skip


def _blob(archive: Archive, program: Program, recipe: BlobRecipe) -> Bytes:
    """The weights of one model as its code reads them."""
    entries = archive.read(recipe.entries(program.sources))
    sources = program.sources
    try:
        return recipe.blob(lambda number: sources[number].values(entries[sources[number].entry]))
    except ValueError as error:
        return refuse("weights of the sizes that the program has", str(error), "copy the file again")


def _run(job: Path, target: str, inductor: Path, on_step: OnStep) -> CompileReport:
    """Run the compiling process and return its report. The process ends when this one does."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise problem(
            "C++ compiler", expected="g++ (or the one that CXX names), which AOTInductor needs",
            found="none", advice="install g++ and compile again",
        )  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1"}
    if target == "cpu":
        threads["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    # Torch keeps precompiled headers in the folder for temporary files, whatever its variable says. In /tmp
    # any user of this machine could have put others there, which the compiler would take.
    inductor.mkdir(parents=True, exist_ok=True)
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(inductor), "TMPDIR": str(inductor)}
    env = {**os.environ, **_MALLOC, **threads, **folders}
    command = [sys.executable, "-m", "clockwork_serve.store.torch.process", str(job)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        tail: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        reader = threading.Thread(target=_drain, args=(process.stderr, tail), daemon=True)
        reader.start()
        try:
            report = _read_report(process.stdout, tail, on_step)
            status = 0 if report is not None else process.wait()
        finally:
            process.kill()
        reader.join(1.0)
    if report is None:
        last_line = next((line for line in reversed(tail) if line.strip()), "nothing")
        raise problem(
            "model.pt2", expected="a program that AOTInductor compiles",
            found=f"the compiler ended with status {status} and printed: {last_line}",
            advice="export it again, or serve it as ONNX",
        )  # fmt: skip
    return report


def _read_report(stdout: object, tail: collections.deque[str], on_step: OnStep) -> CompileReport | None:
    for line in stdout:  # type: ignore[attr-defined]
        try:
            message = msgspec.json.decode(line, type=CompileStep | CompileReport)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            tail.append(line.decode(errors="replace"))  # something torch printed
            continue
        if isinstance(message, CompileReport):
            return message
        on_step(message.text)
    return None


def _drain(stream: object, tail: collections.deque[str]) -> None:
    for line in iter(lambda: stream.readline(_LINE_MAX), b""):  # type: ignore[attr-defined]
        tail.append(line.decode(errors="replace").rstrip())
