"""Compiles ONNX models into code and weights, and verifies that results do not change."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
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
from clockwork_serve.store.onnx.recipe import PROBES, Recipe, learnt, probe_elements
from clockwork_serve.store.onnx.row_analysis import veto
from clockwork_serve.store.onnx.row_trial import BatchingVerdict, batching_verdict
from clockwork_serve.store.onnx.source import ModelSource
from clockwork_serve.store.onnx.weights import RECURRENT_OPS, Lifted, lift, views
from clockwork_serve.store.onnx.wire import elements, filled
from clockwork_serve.store.optimiser import Optimiser, Session, open_optimised, parse_model
from clockwork_serve.store.settings import ModelSettings, ProblemError, StoreConfig
from clockwork_serve.store.trial import (
    GraphTensor,
    Interface,
    RunError,
    Trial,
    difference,
    find_trial,
    likely,
    variants,
)
from clockwork_serve.units import MIB, align

# ------------------------------------------------------------
# A model optimised and lifted, verified to give the same results.


TOLERANCE = 1e-5  # largest relative difference between a lifted graph's results and an ordinary session's
RECURRENT_TOLERANCE = 5e-4
"""The same for recurrent graphs: with weights as inputs their kernels sum in another order."""
_NOISE_FACTOR = 2
"""A model whose results differ more between batch sizes, by rounding, is allowed this multiple of it."""
_BRANCHES = frozenset({"If", "Loop", "Scan"})


class Lowered(Struct, frozen=True):
    """A model optimised and lifted, with its ordinary session to compare with."""

    session: Session
    optimised: bytes
    lifted: Lifted


class Proved(Struct, frozen=True):
    """A lowered model and the plan that made it; ``obstacle`` says why the lifted graph cannot be used."""

    lowered: Lowered
    plan: GraphPlan
    obstacle: str


def lower(data: memoryview | bytes, plan: GraphPlan, optimiser: Optimiser) -> Lowered:
    """Optimise and lift a model. Raises ``ProblemError`` if ONNX Runtime does not open it."""
    session, optimised = optimiser.optimise(prepared(parse_model(data), plan))
    return _lifted(session, optimised, plan)


def _lifted(session: Session, optimised: bytes, plan: GraphPlan) -> Lowered:
    model = parse_model(optimised)
    if plan.block:
        matmuls_to_convolutions(model, plan.block)
    return Lowered(session, optimised, lift(model, branches=plan.branches))


def prove(lowered: Lowered, plan: GraphPlan, trial: Trial | str) -> Proved:
    """Compare the lifted graph with the ordinary session; with reduced plans until one agrees."""
    if not isinstance(trial, Trial):
        return Proved(lowered, plan, f"it could not be run on generated inputs ({trial})")
    proved = Proved(lowered, plan, _obstacle(lowered, trial))
    for lesser in _lesser(lowered, plan):
        if not proved.obstacle:
            break
        plain = _lifted(lowered.session, lowered.optimised, lesser)
        proved = Proved(plain, lesser, _obstacle(plain, trial))
    return proved


def _lesser(lowered: Lowered, plan: GraphPlan) -> list[GraphPlan]:
    """Plans without what may be the obstacle: rewritten products, weights of branches, both."""
    change = msgspec.structs.replace
    rewritten = bool(plan.block) and "ReorderInput" in lowered.lifted.operators
    branches = plan.branches and bool(lowered.lifted.operators & _BRANCHES)
    lesser = [change(plan, block=0)] if rewritten else []
    if branches:
        lesser.append(change(plan, branches=False))
    if rewritten and branches:
        lesser.append(change(plan, block=0, branches=False))
    return lesser


def _obstacle(lowered: Lowered, trial: Trial) -> str:
    lifted = lowered.lifted
    tolerance = RECURRENT_TOLERANCE if bool(lifted.operators & RECURRENT_OPS) else TOLERANCE
    try:
        session = open_optimised(lifted.graph)
        for inputs in variants(trial):
            try:
                wanted = lowered.session.run(inputs)
            except RunError:
                continue
            gap = difference(session.run({**inputs, **views(lifted.index, lifted.blob)}), wanted)
            if gap > max(tolerance, _NOISE_FACTOR * trial.noise):
                return f"with its weights as inputs its answers differ by {gap:.1e} (at most {tolerance:.0e})"
    except ProblemError as error:
        return f"with its weights as inputs it does not open ({error.problem.found})"
    except RunError as error:
        return f"with its weights as inputs it does not run ({error})"
    return ""


# ------------------------------------------------------------
# Compiles ONNX models into code and weights; lifts nothing that would change a result.


_BAKED_WORTH_A_WARNING = 1 * MIB
_RECIPES_KEPT_BYTES = 512 * MIB


class OnnxArchitecture(Struct, frozen=True, kw_only=True):
    """What copies share: their plan, what the first compiled to, and how further copies are made.

    ``copies``: ``once`` after the first, then ``gather`` (there is a recipe) or ``each`` (there is none).
    ``digest`` is that of the lifted graph.
    """

    plan: GraphPlan
    first: Compiled
    digest: str
    copies: str = "once"


class OnnxCompiler:
    """Compiles sources one by one; keeps recipes of recent architectures in memory."""

    def __init__(self, cache: Cache, config: StoreConfig, optimiser: Optimiser) -> None:
        self._cache = cache
        self._config = config
        self._optimiser = optimiser
        self._recipes: dict[str, Recipe] = {}

    def compile(self, source: ModelSource, settings: ModelSettings) -> Compiled:
        """Code and weights of a model, stored unless present. Raises ``ProblemError``."""
        key = digest_of(source.frame.digest, settings.compile_key(self._config))
        gathered = self._gathered(source, key)
        if gathered is not None:
            return gathered
        content = digest_of(source.content, settings.compile_key(self._config))
        compiled = self._found(content)
        if compiled is None:
            # Copies wait for the first of their architecture, in this process and in others. If the
            # architecture has no recipe, only equal files wait for each other.
            known = self._known(key)
            alone = known is not None and known.copies == "each"
            with self._cache.lock(content if alone else key):
                compiled = self._found(content) or self._gathered(source, key)
                compiled = compiled or self._optimised(source, settings, key)
            self._cache.save_record("compiled", content, compiled)
        return compiled

    def _found(self, content: str) -> Compiled | None:
        """What a model of that content was compiled to before, if all of it is still there."""
        compiled = self._cache.record("compiled", content, Compiled)
        return compiled if compiled is not None and compiled.present(self._cache) else None

    def _optimised(self, source: ModelSource, settings: ModelSettings, key: str) -> Compiled:
        known = self._known(key)
        if known is None:
            return self._first(source, settings, key)
        lowered = lower(source.data, known.plan, self._optimiser)
        if known.copies == "once":
            self._learn(source, key, known, lowered.lifted)
        if known.first.lifted and lowered.lifted.digest == known.digest:
            return self._copy(known, lowered.lifted.blob)
        trial = find_trial(lowered.session, known.plan.interface, batched=known.plan.max_batch_size > 0)
        return self._stored(prove(lowered, known.plan, trial), settings, trial)

    # The first of an architecture

    def _first(self, source: ModelSource, settings: ModelSettings, key: str) -> Compiled:
        optional = [tensor.name for tensor in settings.inputs if tensor.optional]
        found = interface_of(parse_model(source.data), optional)
        batching = batching_of(found, settings, self._config)
        plan = _planned(found, batching, settings, self._optimiser.block)
        lowered = lower(source.data, plan, self._optimiser)
        trial = find_trial(lowered.session, plan.interface, batched=plan.max_batch_size > 0)
        verdict = self._verdict(source.data, lowered, plan, trial, asked=bool(settings.max_batch_size))
        if verdict.lost or verdict.squeezed:
            batching = Batching(0, verdict.lost) if verdict.lost else batching
            plan = _planned(found, batching, settings, self._optimiser.block)
            plan = msgspec.structs.replace(plan, squeezed=verdict.squeezed)
            lowered = lower(source.data, plan, self._optimiser)
            trial = find_trial(lowered.session, plan.interface, batched=plan.max_batch_size > 0)
        plan = msgspec.structs.replace(plan, lost=verdict.warning or plan.lost)
        proved = prove(lowered, plan, trial)
        compiled = self._stored(proved, settings, trial)
        architecture = OnnxArchitecture(
            plan=proved.plan, first=compiled, digest=proved.lowered.lifted.digest,
            copies="once" if compiled.lifted else "each",
        )  # fmt: skip
        self._cache.save_record("architectures", key, architecture)
        return compiled

    def _verdict(
        self, data: memoryview, lowered: Lowered, plan: GraphPlan, trial: Trial | str, *, asked: bool
    ) -> BatchingVerdict:
        """Whether the model is row-independent, by analysis of the graph and by trial."""
        if not plan.max_batch_size:
            return BatchingVerdict()
        sizes = batch_sizes(plan.max_batch_size)
        fills = trial.fills if isinstance(trial, Trial) else likely(plan.interface, batched=True)
        why = veto(parse_model(data), plan.interface, fills, sizes)
        return batching_verdict(lowered.session, plan.interface, trial, asked=asked, veto=why)

    def _stored(self, proved: Proved, settings: ModelSettings, trial: Trial | str) -> Compiled:
        """Store code and weights; lifted if that gives the same results."""
        plan, obstacle, lifted = proved.plan, proved.obstacle, proved.lowered.lifted
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
        code_id = digest_of(self._cache.runtime, lifted.digest, msgspec.json.encode(code))[:32]
        code = msgspec.structs.replace(code, code_id=code_id)
        index = OnnxIndex(tensors=(), blob_bytes=0) if obstacle else lifted.index
        files = {"index.json": msgspec.json.encode(index)}
        if not obstacle:
            files["model.onnx"] = lifted.graph
        if tried:
            files["probe.json"] = msgspec.json.encode(tried.fills)
        if self._cache.code(code_id) is None:
            self._cache.save_code(code, files)
        stored: bytes | npt.NDArray[np.uint8] = proved.lowered.optimised if obstacle else lifted.blob
        return compiled_of(
            code, self._cache.save_weights(stored), len(stored), settings,
            max_batch_size=plan.max_batch_size,
            seen_bytes=_seen_bytes(tried, outputs, by_values),
            warnings=(plan.lost, *_warnings(lifted, obstacle, code)),
        )  # fmt: skip

    # Further copies

    def _known(self, key: str) -> OnnxArchitecture | None:
        known = self._cache.record("architectures", key, OnnxArchitecture)
        return known if known is not None and self._cache.code(known.first.code_id) is not None else None

    def _gathered(self, source: ModelSource, key: str) -> Compiled | None:
        """The model by its architecture's recipe, if there is one."""
        known = self._known(key)
        if known is None or known.copies != "gather":
            return None
        recipe = self._recipe(key)
        return None if recipe is None else self._copy(known, recipe.blob(_flat(source)))

    def _copy(self, known: OnnxArchitecture, blob: npt.NDArray[np.uint8]) -> Compiled:
        return msgspec.structs.replace(known.first, weights_id=self._cache.save_weights(blob))

    def _learn(self, source: ModelSource, key: str, known: OnnxArchitecture, true: Lifted) -> None:
        """Derive the recipe on the second copy, and verify it there: same graph, same blob, byte for byte."""
        recipe = self._probed(source, known) if true.digest == known.digest else None
        if recipe is not None:
            same = np.array_equal(recipe.blob(_flat(source)), true.blob)
            recipe = recipe if same else None
        if recipe is not None:
            self._cache.save("architectures", f"{key}.npz", recipe.to_bytes())
        copies = "each" if recipe is None else "gather"
        self._cache.save_record("architectures", key, msgspec.structs.replace(known, copies=copies))

    def _probed(self, source: ModelSource, known: OnnxArchitecture) -> Recipe | None:
        frame = source.frame
        blobs = []
        for probe in PROBES:
            flat = probe_elements(frame.elements, probe)
            if flat is None or not frame.holes:
                return None
            try:
                data = filled(source.data, frame.holes, flat)
                lifted = lower(data, known.plan, self._optimiser).lifted
            except ProblemError:
                return None
            if lifted.digest != known.digest:
                return None
            blobs.append(lifted.blob)
        return learnt(blobs, frame.elements)

    def _recipe(self, key: str) -> Recipe | None:
        recipe = self._recipes.get(key)
        if recipe is None:
            stored = self._cache.read("architectures", f"{key}.npz")
            try:
                recipe = None if stored is None else Recipe.from_bytes(stored)
            except ValueError:
                recipe = None
            if recipe is None:
                return None
            while self._recipes and recipe.blob_bytes + self._kept_bytes() > _RECIPES_KEPT_BYTES:
                del self._recipes[next(iter(self._recipes))]
            self._recipes[key] = recipe
        return recipe

    def _kept_bytes(self) -> int:
        return sum(recipe.blob_bytes for recipe in self._recipes.values())


def _flat(source: ModelSource) -> npt.NDArray[np.uint32]:
    return elements(source.data, source.frame.holes)


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
        "is reserved for it by estimate; declare its dims if they are always the same"
        for spec in code.outputs
        if -1 in spec.shape and spec.name in lifted.shaped_by_values
    ]
    found += [
        f"input '{spec.name}' leaves dimensions open {list(spec.shape)}: requests share a batch "
        "only if their shapes are equal, and durations are predicted less well; declare dims to fix them"
        for spec in code.inputs
        if -1 in spec.shape
    ]
    return found
