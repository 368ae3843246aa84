"""A model optimised and lifted, with the proof that this changes no answer; never without the proof."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from clockwork_serve.store.lifting import RECURRENT_OPS, Lifted, lift
from clockwork_serve.store.onnx_graph import Plan, prepared
from clockwork_serve.store.optimiser import Optimiser, Session, open_optimised, parse_model
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
    return Lowered(session, optimised, lift(parse_model(optimised), branches=plan.branches))


def prove(lowered: Lowered, plan: Plan, trial: Trial | str) -> Proved:
    """Compare the lifted graph with the ordinary session; without the weights of branches if need be."""
    if not isinstance(trial, Trial):
        return Proved(lowered, plan, f"it could not be tried out ({trial})")
    obstacle = _obstacle(lowered, trial)
    if not obstacle or not plan.branches or not lowered.lifted.operators & _BRANCHES:
        return Proved(lowered, plan, obstacle)
    plain = Lowered(lowered.session, lowered.optimised, lift(parse_model(lowered.optimised), branches=False))
    return Proved(plain, msgspec.structs.replace(plan, branches=False), _obstacle(plain, trial))


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
