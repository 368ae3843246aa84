"""Compiles ONNX models into code and weights, and verifies that results do not change."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from msgspec import Struct

from clockwork_serve.messages import Code, OnnxIndex
from clockwork_serve.store.cache import Cache, Compiled, batch_sizes, compiled_of, digest_of
from clockwork_serve.store.onnx.graph import (
    Batching,
    GraphPlan,
    batching_of,
    declared,
    interface_of,
    opened,
    prepared,
    specs,
)
from clockwork_serve.store.onnx.output_shapes import resolved_outputs
from clockwork_serve.store.onnx.pixels import matmuls_to_convolutions
from clockwork_serve.store.onnx.row_rule import objection
from clockwork_serve.store.onnx.row_trial import BatchingVerdict, batching_verdict
from clockwork_serve.store.onnx.source import ModelSource
from clockwork_serve.store.onnx.weights import RECURRENT_OPS, Lifted, lift, views
from clockwork_serve.store.optimiser import Optimiser, Session, open_optimised, open_plain, parse_model
from clockwork_serve.store.settings import ModelSettings, ProblemError, StoreConfig
from clockwork_serve.store.trial import (
    Array,
    Fill,
    GraphTensor,
    Interface,
    RunError,
    Runs,
    Trial,
    difference,
    find_trial,
    noise_of,
    run_trial,
    variants,
)
from clockwork_serve.units import MIB, align

# ------------------------------------------------------------
# A model optimised and lifted, verified to give the same results.


TOLERANCE = 1e-5  # largest relative difference between a lifted graph's results and a plain session's
RECURRENT_TOLERANCE = 5e-4
"""The same for recurrent graphs: with weights as inputs their kernels sum in another order."""
_NOISE_FACTOR = 2
"""A model whose results differ more between batch sizes, by rounding, is allowed this multiple of it."""
_BRANCHES = frozenset({"If", "Loop", "Scan"})


class Lowered(Struct, frozen=True):
    """A model optimised and lifted by a plan, with the session that optimised it."""

    plan: GraphPlan
    session: Session
    optimised: bytes
    lifted: Lifted


class FirstAnswers(Struct, frozen=True):
    """What a model answers to trial inputs before its weights are lifted.

    ``trial`` is a text where no generated inputs ran. Each of ``pairs`` is inputs and their outputs.
    """

    trial: Trial | str
    pairs: list[tuple[dict[str, Array], list[Array]]] = []


class OnnxArchitecture(Struct, frozen=True, kw_only=True):
    """What was determined on the first model of a lifted graph for all of them, as whether rows mix.

    ``fills`` are inputs on which it runs, None if none were found. ``lifted``: its answers to one row and, if
    it is batched, to two were right with its weights as inputs.
    """

    plan: GraphPlan
    fills: tuple[Fill, ...] | None
    lifted: bool = False


class Proved(Struct, frozen=True):
    """A lowered model, and ``unlifted``, the model to store if ``obstacle`` says why it cannot be lifted."""

    lowered: Lowered
    obstacle: str
    unlifted: bytes


def lower(model: onnx.ModelProto, plan: GraphPlan, optimiser: Optimiser) -> Lowered:
    """Optimise and lift ``model``, which is changed. Raises ``ProblemError`` if it cannot be opened."""
    return _lifted(plan, *optimiser.optimise(prepared(model, plan)))


def _lifted(plan: GraphPlan, session: Session, optimised: bytes) -> Lowered:
    model = parse_model(optimised)
    if plan.block:
        matmuls_to_convolutions(model, plan.block)
    return Lowered(plan, session, optimised, lift(model, branches=plan.branches))


class _Plain:
    """A plain session of a model's own file; squeezed outputs get the batch axis that the plan restores."""

    def __init__(self, data: bytes, plan: GraphPlan) -> None:
        self._session = open_plain(data)
        self._rows = [plan.squeezed.get(tensor.name) for tensor in plan.interface.outputs]

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs in order. Raises ``RunError``."""
        outputs = self._session.run(inputs)
        pairs = zip(outputs, self._rows, strict=True)
        return [output if row is None else output.reshape(-1, *row) for output, row in pairs]


def first_answers(data: memoryview, lowered: Lowered, architecture: OnnxArchitecture) -> FirstAnswers:
    """The answers of a plain session of the model's own file to the inputs of its architecture.

    Where the first model was right for two rows, one row is enough for its copies: only their weights are
    others. A file that does not run as it is (it may declare wrong shapes of what it computes) is compared
    with the session that optimised it.
    """
    batched = lowered.plan.max_batch_size > 0
    trial: Trial | str
    if architecture.fills is not None:
        with contextlib.suppress(ProblemError, RunError):
            plain = _Plain(bytes(data), lowered.plan)
            trial = run_trial(plain, architecture.fills, batched=batched and not architecture.lifted)
            if not trial.two_failed:
                return FirstAnswers(trial, _pairs(plain, trial))
    trial = find_trial(lowered.session, lowered.plan.interface, batched=batched)
    return FirstAnswers(trial, _pairs(lowered.session, trial) if isinstance(trial, Trial) else [])


def _pairs(session: Runs, trial: Trial) -> list[tuple[dict[str, Array], list[Array]]]:
    pairs = [(trial.one, trial.outputs)]
    if trial.two is not None and trial.outputs_of_two is not None:
        pairs.append((trial.two, trial.outputs_of_two))
    for inputs in variants(trial)[len(pairs) :]:
        with contextlib.suppress(RunError):
            pairs.append((inputs, session.run(inputs)))
    return pairs


def prove(data: memoryview, lowered: Lowered, answers: FirstAnswers) -> Proved:
    """Compare the lifted graph with the model's first answers; with reduced plans until one agrees."""
    if not isinstance(answers.trial, Trial):
        obstacle = f"it could not be run on generated inputs ({answers.trial})"
        return Proved(lowered, obstacle, lowered.optimised)
    obstacle = _obstacle(lowered, answers)
    for lesser in _lesser(lowered):
        if not obstacle:
            break
        lowered = _lifted(lesser, lowered.session, lowered.optimised)
        obstacle = _obstacle(lowered, answers)
    return Proved(lowered, obstacle, _unlifted(data, lowered, answers) if obstacle else b"")


def _lesser(lowered: Lowered) -> list[GraphPlan]:
    """Plans without what may be the obstacle: rewritten products, weights of branches, both."""
    change, plan = msgspec.structs.replace, lowered.plan
    rewritten = bool(plan.block) and "ReorderInput" in lowered.lifted.operators
    branches = plan.branches and bool(lowered.lifted.operators & _BRANCHES)
    lesser = [change(plan, block=0)] if rewritten else []
    if branches:
        lesser.append(change(plan, branches=False))
    if rewritten and branches:
        lesser.append(change(plan, block=0, branches=False))
    return lesser


def _obstacle(lowered: Lowered, answers: FirstAnswers) -> str:
    """Why the lifted graph with this model's weights cannot be used; empty if it can."""
    lifted = lowered.lifted
    try:
        gap = _gap(lifted.graph, views(lifted.index, lifted.blob), answers)
    except ProblemError as error:
        return f"with its weights as inputs it does not open ({error.problem.found})"
    except RunError as error:
        return f"with its weights as inputs it does not run ({error})"
    if _is_rounding(gap, lowered, answers):
        return ""
    return f"with its weights as inputs its answers differ by {gap:.1e} (at most {_tolerance(lowered):.0e})"


def _gap(graph: bytes, weights: Mapping[str, Array], answers: FirstAnswers) -> float:
    """The largest difference between the graph's answers and the first. ``ProblemError``, ``RunError``."""
    session = open_optimised(graph)
    return max(difference(session.run({**inputs, **weights}), wanted) for inputs, wanted in answers.pairs)


def _tolerance(lowered: Lowered) -> float:
    return RECURRENT_TOLERANCE if bool(lowered.lifted.operators & RECURRENT_OPS) else TOLERANCE


def _is_rounding(gap: float, lowered: Lowered, answers: FirstAnswers) -> bool:
    if gap <= _tolerance(lowered):
        return True
    if gap == float("inf") or not lowered.plan.max_batch_size or not isinstance(answers.trial, Trial):
        return False
    return gap <= _NOISE_FACTOR * noise_of(lowered.session, answers.trial.fills)


def _unlifted(data: memoryview, lowered: Lowered, answers: FirstAnswers) -> bytes:
    """The optimised model; but the model as it is, if optimising changes its answers.

    Random answers change all the time, and prove nothing.
    """
    inputs = answers.pairs[0][0]
    with contextlib.suppress(ProblemError, RunError):
        if _is_rounding(_gap(lowered.optimised, {}, answers), lowered, answers):
            return lowered.optimised
        if difference(lowered.session.run(inputs), lowered.session.run(inputs)):
            return lowered.optimised
    return prepared(parse_model(data), lowered.plan)


# ------------------------------------------------------------
# Compiles ONNX models into code and weights; lifts nothing that would change a result.


_BAKED_WORTH_A_WARNING = 1 * MIB


class OnnxCompiler:
    """Compiles sources one by one. Each is optimised by itself, and equal lifted graphs share a code."""

    def __init__(self, cache: Cache, config: StoreConfig, optimiser: Optimiser) -> None:
        self._cache = cache
        self._config = config
        self._optimiser = optimiser

    def compile(self, source: ModelSource, settings: ModelSettings) -> Compiled:
        """Code and weights of a model, stored unless present. Raises ``ProblemError``."""
        content = digest_of(source.content, settings.compile_key(self._config))
        compiled = self._found(content)
        if compiled is None:
            with self._cache.lock(content):  # equal files are compiled once, by whichever process
                compiled = self._found(content)
                if compiled is None:
                    compiled = self._compiled(source, settings)
                    self._cache.save_record("compiled", content, compiled)
        return compiled

    def _found(self, content: str) -> Compiled | None:
        """What a model of that content was compiled to before, if all of it is still there."""
        compiled = self._cache.record("compiled", content, Compiled)
        return compiled if compiled is not None and compiled.present(self._cache) else None

    def _compiled(self, source: ModelSource, settings: ModelSettings) -> Compiled:
        found, lowered = self._lowered(source, settings)
        # What the rule says holds for all weights. A declaration does not: each such copy is tried by itself.
        declared_only = bool(settings.max_batch_size) and self._objection(source.data, lowered.plan)
        key = digest_of(
            lowered.lifted.digest, msgspec.json.encode(lowered.plan), settings.compile_key(self._config),
            source.content if declared_only else "",
        )  # fmt: skip
        known = self._cache.record("architectures", key, OnnxArchitecture)
        if known is None:
            with self._cache.lock(key, inner=True):  # further copies wait for the first
                known = self._cache.record("architectures", key, OnnxArchitecture)
                if known is None:
                    return self._first(source.data, found, settings, lowered, key)
        proved, answers = self._proved(source.data, lowered, known)
        return self._stored(proved, settings, answers.trial)

    def _lowered(self, source: ModelSource, settings: ModelSettings) -> tuple[Interface, Lowered]:
        """The model's interface, and the model lowered by what its interface and its settings say."""
        model = parse_model(source.data)
        found = interface_of(model, [tensor.name for tensor in settings.inputs if tensor.optional])
        batching = batching_of(found, settings, self._config)
        plan = _planned(found, batching, settings, self._optimiser.block)
        return found, lower(model, plan, self._optimiser)

    def _first(
        self, data: memoryview, found: Interface, settings: ModelSettings, lowered: Lowered, key: str
    ) -> Compiled:
        architecture = self._determined(data, found, settings, lowered)
        proved, answers = self._proved(data, lowered, architecture)
        if not proved.obstacle:
            architecture = msgspec.structs.replace(architecture, plan=proved.lowered.plan, lifted=True)
        self._cache.save_record("architectures", key, architecture)
        return self._stored(proved, settings, answers.trial)

    def _proved(
        self, data: memoryview, lowered: Lowered, architecture: OnnxArchitecture
    ) -> tuple[Proved, FirstAnswers]:
        lowered = self._replanned(data, lowered, architecture.plan)
        answers = first_answers(data, lowered, architecture)
        return prove(data, lowered, answers), answers

    def _determined(
        self, data: memoryview, found: Interface, settings: ModelSettings, lowered: Lowered
    ) -> OnnxArchitecture:
        plan = lowered.plan
        trial = find_trial(lowered.session, plan.interface, batched=plan.max_batch_size > 0)
        verdict = self._verdict(data, lowered, plan, trial, asked=bool(settings.max_batch_size))
        if verdict.lost:
            plan = _planned(found, Batching(0, verdict.lost), settings, self._optimiser.block)
            lowered = self._replanned(data, lowered, plan)
            trial = find_trial(lowered.session, plan.interface, batched=False)
        plan = msgspec.structs.replace(plan, squeezed=verdict.squeezed, lost=verdict.warning or plan.lost)
        return OnnxArchitecture(plan=plan, fills=trial.fills if isinstance(trial, Trial) else None)

    def _replanned(self, data: memoryview, lowered: Lowered, plan: GraphPlan) -> Lowered:
        """The model lowered by another plan; optimised again only if that has other shapes."""
        old = lowered.plan
        if (old.interface, old.squeezed, old.stated) != (plan.interface, plan.squeezed, plan.stated):
            return lower(parse_model(data), plan, self._optimiser)
        if (old.block, old.branches) != (plan.block, plan.branches):
            return _lifted(plan, lowered.session, lowered.optimised)
        return msgspec.structs.replace(lowered, plan=plan)

    def _verdict(
        self, data: memoryview, lowered: Lowered, plan: GraphPlan, trial: Trial | str, *, asked: bool
    ) -> BatchingVerdict:
        """Whether the model is batched: by its configuration or by the rule, as far as trials agree."""
        if not plan.max_batch_size:
            return BatchingVerdict()
        why = "" if asked else self._objection(data, plan)
        return batching_verdict(lowered.session, plan.interface, trial, asked=asked, objection=why)

    def _objection(self, data: memoryview, plan: GraphPlan) -> str:
        return objection(parse_model(data), plan.interface) if plan.max_batch_size else ""

    def _stored(self, proved: Proved, settings: ModelSettings, trial: Trial | str) -> Compiled:
        """Store code and weights; lifted if that gives the same results."""
        plan, obstacle, lifted = proved.lowered.plan, proved.obstacle, proved.lowered.lifted
        batched = plan.max_batch_size > 0
        tried = trial if isinstance(trial, Trial) else None
        by_values = {*plan.opened, *lifted.shaped_by_values}
        outputs = resolved_outputs(
            plan.interface, proved.lowered.session.output_shapes(), tried, batched=batched,
            stated=plan.stated, by_values=by_values,
        )  # fmt: skip
        code = Code(
            code_id="", backend="onnx", path="", inputs=specs(plan.interface.inputs, batched=batched),
            outputs=specs(outputs, batched=batched), batched=batched,
            batch_sizes=batch_sizes(plan.max_batch_size), lifted=not obstacle,
        )  # fmt: skip
        # A model that is stored as it is takes longer than an optimised one: another code.
        way = b"as it is" if obstacle and proved.unlifted is not proved.lowered.optimised else b""
        code_id = digest_of(self._cache.runtime, lifted.digest, msgspec.json.encode(code), way)[:32]
        code = msgspec.structs.replace(code, code_id=code_id)
        index = OnnxIndex(tensors=(), blob_bytes=0) if obstacle else lifted.index
        files = {"index.json": msgspec.json.encode(index)}
        if not obstacle:
            files["model.onnx"] = lifted.graph
        if tried:
            files["probe.json"] = msgspec.json.encode(tried.fills)
        if self._cache.code(code_id) is None:
            self._cache.save_code(code, files)
        stored: bytes | npt.NDArray[np.uint8] = proved.unlifted if obstacle else lifted.blob
        return compiled_of(
            code, self._cache.save_weights(stored), len(stored), settings,
            max_batch_size=plan.max_batch_size,
            seen_bytes=_seen_bytes(tried, outputs, by_values),
            warnings=(plan.lost, *_warnings(lifted, obstacle, code)),
        )  # fmt: skip


def _planned(found: Interface, batching: Batching, settings: ModelSettings, block: int) -> GraphPlan:
    interface = declared(found, settings, batched=batching.max_batch_size > 0)
    both = zip(found.outputs, interface.outputs, strict=True)
    return GraphPlan(
        interface=interface, max_batch_size=batching.max_batch_size,
        opened=tuple(new.name for old, new in both if opened(old, new)),
        stated=tuple(tensor.name for tensor in settings.outputs if tensor.dims is not None),
        lost=batching.lost, block=block,
    )  # fmt: skip


def _seen_bytes(trial: Trial | None, outputs: Sequence[GraphTensor], by_values: Collection[str]) -> int:
    """Bytes of the outputs in the trial, but for those whose sizes made-up values decided there."""
    if trial is None:
        return 0
    pairs = zip(outputs, trial.outputs, strict=True)
    return sum(align(seen.nbytes) for tensor, seen in pairs if tensor.name not in by_values)


def _warnings(lifted: Lifted, obstacle: str, code: Code) -> list[str]:
    found = []
    whole = "" if code.batched else ", and max_batch_size = 0, so that they are the full shape"
    if obstacle:
        found.append(
            f"weights are not lifted: {obstacle}; each LOAD opens the whole model anew, which is slow, "
            "and copies share no code"
        )
    elif lifted.baked_bytes >= _BAKED_WORTH_A_WARNING:
        found.append(
            f"{lifted.baked_bytes / MIB:.1f} MiB of weights stay in the code (only float32 is "
            "lifted): they take memory for as long as the model is registered, and copies with "
            "other values of them share no code"
        )
    found += [
        f"output '{spec.name}' has a shape that depends on the values of the inputs {list(spec.shape)}: room "
        f"is reserved for it by estimate; declare its dims if they are always the same{whole}"
        for spec in code.outputs
        if -1 in spec.shape and spec.name in lifted.shaped_by_values
    ]
    found += [
        f"input '{spec.name}' leaves dimensions open {list(spec.shape)}: requests share a batch "
        "only if their shapes are equal, and durations are predicted less well; declare dims to fix "
        f"them{whole}"
        for spec in code.inputs
        if -1 in spec.shape
    ]
    return found
