"""A model optimised and lifted, with the proof that this changes no answer; never without the proof."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from clockwork_serve.store.lifting import RECURRENT_OPS, Lifted, lift
from clockwork_serve.store.onnx_graph import Plan, prepared
from clockwork_serve.store.optimiser import Optimiser, Session, open_optimised, parse_model
from clockwork_serve.store.pixels import rows_as_pixels
from clockwork_serve.store.problems import ProblemError
from clockwork_serve.store.trial import RunError, Trial, difference, variants

TOLERANCE = 1e-5
"""Largest relative difference between a lifted graph's answers and an ordinary session's."""
RECURRENT_TOLERANCE = 5e-4
"""The same for recurrent graphs: with weights that are inputs their kernels sum in another order."""
_NOISE_FACTOR = 2
"""A model that turns rounding itself into larger differences, between batch sizes, is allowed as much."""
_BRANCHES = frozenset({"If", "Loop", "Scan"})


class Lowered(Struct, frozen=True):
    """A model optimised and lifted, with its ordinary session to compare with."""

    session: Session
    optimised: bytes
    lifted: Lifted


class Proved(Struct, frozen=True):
    """A lowered model and the plan that made it; ``obstacle`` says why the lifted graph cannot be used."""

    lowered: Lowered
    plan: Plan
    obstacle: str


def lower(data: memoryview | bytes, plan: Plan, optimiser: Optimiser) -> Lowered:
    """Optimise and lift a model. Raises ``ProblemError`` if ONNX Runtime does not open it."""
    session, optimised = optimiser.optimise(prepared(parse_model(data), plan))
    return _lifted(session, optimised, plan)


def _lifted(session: Session, optimised: bytes, plan: Plan) -> Lowered:
    model = parse_model(optimised)
    if plan.block:
        rows_as_pixels(model, plan.block)
    return Lowered(session, optimised, lift(model, branches=plan.branches))


def prove(lowered: Lowered, plan: Plan, trial: Trial | str) -> Proved:
    """Compare the lifted graph with the ordinary session; by a lesser plan if need be, told by the result."""
    if not isinstance(trial, Trial):
        return Proved(lowered, plan, f"it could not be tried out ({trial})")
    proved = Proved(lowered, plan, _obstacle(lowered, trial))
    for lesser in _lesser(lowered, plan):
        if not proved.obstacle:
            break
        plain = _lifted(lowered.session, lowered.optimised, lesser)
        proved = Proved(plain, lesser, _obstacle(plain, trial))
    return proved


def _lesser(lowered: Lowered, plan: Plan) -> list[Plan]:
    """Plans that leave out what may be the obstacle: rewritten products, the weights of branches, both."""
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
    recurrent = bool(lifted.operators & RECURRENT_OPS)
    tolerance = RECURRENT_TOLERANCE if recurrent else TOLERANCE
    try:
        session = open_optimised(lifted.graph)
        for inputs in variants(trial):
            try:
                wanted = lowered.session.run(inputs)
            except RunError:
                continue
            gap = difference(session.run({**inputs, **lifted.index.views(lifted.blob)}), wanted)
            if gap > max(tolerance, _NOISE_FACTOR * trial.noise):
                return f"with its weights as inputs its answers differ by {gap:.1e} (at most {tolerance:.0e})"
    except ProblemError as error:
        return f"with its weights as inputs it does not open ({error.problem.found})"
    except RunError as error:
        return f"with its weights as inputs it does not run ({error})"
    return ""
