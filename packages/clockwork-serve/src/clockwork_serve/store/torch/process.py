"""The process that compiles one torch program: reports each step on stdout, then ends.

Compilers leak memory and mappings, and may crash, so each program has a process of its own.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from clockwork_serve.store.onnx.row_trial import batching_verdict
from clockwork_serve.store.settings import Problem, ProblemError, problem
from clockwork_serve.store.torch.archive import FILE, read_archive
from clockwork_serve.store.torch.packages import (
    Eager,
    FilledPackage,
    Flat,
    Values,
    allowed,
    compile_package,
    lowered,
    proved,
    tensors_of,
    timed_ns,
)
from clockwork_serve.store.torch.plan import CompileJob, CompileReport, CompileStep
from clockwork_serve.store.torch.program import Program, read_program
from clockwork_serve.store.torch.target import target_here
from clockwork_serve.store.trial import GraphTensor, Interface, Trial, find_trial, generate_inputs

_LEAST_GAIN = 0.03  # share of the time per row that a batch size must save over the next smaller one kept
_MOST_WITHOUT_GAIN = 2  # after so many batch sizes without a gain, only the largest is tried


def main() -> int:
    """Run the job in the file that is named; the end of stdin ends the process."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=CompileJob)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        report = _Work(job).done()
    except ProblemError as error:
        report = CompileReport(problem=error.problem)
    except Exception as error:  # noqa: BLE001 - compilers raise anything; the model is a problem, not a crash
        report = CompileReport(problem=_unexpected(error))
    _say(report)
    return 0


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _say(record: CompileStep | CompileReport) -> None:
    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    sys.stdout.flush()


def _unexpected(error: Exception) -> Problem:
    text = str(error).strip()
    return problem(
        FILE, expected="a program that torch opens and AOTInductor compiles",
        found=f"{type(error).__name__}: {' '.join(text.split())[:250]}",
        advice="try torch._inductor.aoti_compile_and_package(torch.export.load('model.pt2')) on it",
    ).problem  # fmt: skip


class _Work:
    """A job in progress."""

    def __init__(self, job: CompileJob) -> None:
        self.job, self.plan = job, job.plan
        self.device = job.target.partition(":")[0]
        here = target_here(self.device)
        if here != job.target:
            raise problem(
                "torch target", expected=f"{job.target} on this machine", found=here or "no such GPU",
                advice="compile on a machine with the GPU that will serve",
            )  # fmt: skip
        _say(CompileStep(text="opening"))
        archive = read_archive(Path(job.program))
        self.program: Program = read_program(archive)
        entries = archive.read([source.entry for source in self.program.sources])
        sources = self.program.sources

        @functools.cache
        def values(number: int) -> np.ndarray[Any, np.dtype[np.void]]:
            return sources[number].values(entries[sources[number].entry])

        self.values: Values = values
        self.exported = torch.export.load(job.program)
        self.inputs = self.plan.interface.inputs
        self.plain = self._flat(fold=False)
        self.row_ns: dict[int, int] = {}
        self.difference = 0.0

    def _flat(self, *, fold: bool) -> Flat:
        return lowered(self.exported, self.program, self.device, fold=fold)

    def done(self) -> CompileReport:
        """Compile, verify and measure every size."""
        batched = self.plan.batched
        eager = Eager(self.plain.module(self.values, self.device), self.inputs, self.device)
        trial = self._tried(eager, batched=batched)
        lost = ""
        if batched and self.plan.sizes[-1] > 1:
            verdict = batching_verdict(eager, self.plan.interface, trial, asked=True)
            lost = verdict.lost
            if verdict.squeezed and not lost:
                lost = f"output '{next(iter(verdict.squeezed))}' has no batch axis for one row"
        if lost:
            batched = False
            trial = self._tried(eager, batched=False)
        packed = self._flat(fold=True)
        kept = self._compiled(packed, trial, batched=batched)
        if kept is None and packed.folded:
            packed = self._flat(fold=False)
            kept = self._compiled(packed, trial, batched=batched)
        if kept is None:
            raise problem(
                FILE, expected="a package that gives the program's results",
                found=f"a relative difference of {self.difference:.2g}",
                advice="please report it with the model",
            )  # fmt: skip
        (Path(self.job.folder) / "recipe.json").write_bytes(msgspec.json.encode(packed.recipe))
        return CompileReport(
            batch_sizes=tuple(kept), outputs=self._outputs(trial, batched=batched), fills=trial.fills,
            lost=lost, folded=packed.folded, row_ns=self.row_ns, difference=self.difference,
        )  # fmt: skip

    def _tried(self, eager: Eager, *, batched: bool) -> Trial:
        """Inputs that the program accepts. Raises ``ProblemError`` if there are none."""
        interface = Interface(self.plan.inputs_of(batched=batched), self.plan.interface.outputs)
        trial = find_trial(eager, interface, batched=batched)
        if isinstance(trial, str):
            raise problem(
                FILE, expected="a program that runs on generated inputs", found=trial,
                advice="check the inputs that it was exported with",
            )  # fmt: skip
        return trial

    def _compiled(self, packed: Flat, trial: Trial, *, batched: bool) -> list[int] | None:
        """The sizes worth keeping; None if a package does not give the program's results."""
        self.row_ns, self.difference = {}, 0.0
        sizes = self.plan.sizes if batched else (1,)
        module = packed.module(self.values, self.device)
        for old in Path(self.job.folder).glob("*.pt2"):
            old.unlink()
        kept: list[int] = []
        without = 0
        for size in sizes:
            last = size == sizes[-1]
            if without >= _MOST_WITHOUT_GAIN and not last:
                continue
            _say(CompileStep(text=f"batch size {size} of {sizes[-1]}" if batched else "compiling"))
            path = Path(self.job.folder) / f"{size}.pt2"
            arrays = generate_inputs(trial.fills, rows=size)
            inputs = tensors_of(arrays, self.inputs, self.device)
            compile_package(module, inputs, path)
            package = FilledPackage(path, self.inputs, self.device)
            self._agree(package, packed, first=not self.row_ns)
            found = proved(package, self.plain, packed, self.values, arrays)
            self.difference = max(self.difference, found)
            if not found <= allowed(self.plain, self.device):
                return None
            self.row_ns[size] = timed_ns(package, inputs, self.device) // size
            if kept and not last and self.row_ns[size] > (1 - _LEAST_GAIN) * self.row_ns[kept[-1]]:
                without += 1
                path.unlink()
                continue
            without = 0
            kept.append(size)
        return kept

    def _agree(self, package: FilledPackage, packed: Flat, *, first: bool) -> None:
        """Lay out in the blob what the packages read; all must read the same constants."""
        reads = package.constants()
        if first:
            packed.keep(reads)
        laid = {tensor.name for tensor in packed.recipe.tensors}
        if reads != laid:
            raise problem(
                FILE, expected="packages that read the same constants at every batch size",
                found=f"{sorted(reads ^ laid)} in one alone", advice="please report it with the model",
            )  # fmt: skip

    def _outputs(self, trial: Trial, *, batched: bool) -> tuple[GraphTensor, ...]:
        """The outputs with their shapes, axis 0 left open if batched."""
        outputs = []
        for tensor, seen in zip(self.plan.interface.outputs, trial.outputs, strict=True):
            dims = ("", *seen.shape[1:]) if batched else seen.shape
            outputs.append(GraphTensor(tensor.name, tensor.datatype, tuple(dims)))
        return tuple(outputs)


if __name__ == "__main__":
    sys.exit(main())
