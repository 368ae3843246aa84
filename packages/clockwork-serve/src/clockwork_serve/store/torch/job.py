"""The job and the messages of the process that compiles torch programs, as records."""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.store.settings import Problem
from clockwork_serve.store.trial import Fill, GraphTensor, Interface

LEAST_GAIN = 0.03
"""Share of the time per row that a batch size must save over the next smaller one kept."""

OPTIONS: dict[str, bool | str] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.use_runtime_constant_folding": False,
    "always_keep_tensor_constants": True,
    "freezing": False,
}
"""How programs are compiled: no value of a weight may become part of the code."""


class CompileJob(Struct, frozen=True, kw_only=True):
    """A program to compile into ``folder``. ``interface`` has every dimension fixed but that of the batch.

    ``sizes`` are the batch sizes to try, ascending; the first and the last are always kept.
    """

    program: str
    folder: str
    interface: Interface
    batched: bool
    asked: bool
    sizes: tuple[int, ...]
    target: str


class CompileStep(Struct, frozen=True, kw_only=True, tag="step"):
    """A progress message: the current step."""

    text: str


class CompileReport(Struct, frozen=True, kw_only=True, tag="report"):
    """The result of a job: packages in its folder, or a ``problem``.

    ``lost`` says why there is no batch although one was wanted, ``doubt`` is a warning about the batch.
    ``row_ns`` is the time per row at each size that was tried; ``difference`` the largest found between
    package and program.
    """

    problem: Problem | None = None
    batch_sizes: tuple[int, ...] = ()
    outputs: tuple[GraphTensor, ...] = ()
    fills: tuple[Fill, ...] = ()
    lost: str = ""
    doubt: str = ""
    folded: int = 0
    row_ns: dict[int, int] = {}
    difference: float = 0.0
