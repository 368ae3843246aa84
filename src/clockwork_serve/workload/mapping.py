"""Which model each function of a trace stands for, and what of it is left out; it says so in words.

The mapping is the experimenter's choice and decides the result (the paper's released client maps
blocks of functions sorted by volume), so every report prints the notes made here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clockwork_serve.workload.problems import FieldError, unfit
from clockwork_serve.workload.processes import Floats, Indices
from clockwork_serve.workload.tables import Load


@dataclass(slots=True)
class Assignment:
    """For every function of a trace, the busiest first: its model (of the load's, from 0) and the share kept.

    ``volume``: calls kept in all. ``notes`` say what was done, with numbers. A function left out keeps
    nothing.
    """

    models: Indices
    kept: Floats
    volume: float
    notes: tuple[str, ...]


def assign(volumes: Floats, load: Load, models: int, rng: np.random.Generator) -> Assignment:
    """Map functions, given by their volumes in descending order, to models as the load asks.

    ``block``: function i of F goes to model floor(i * M / F). ``stripe``: to i mod M. ``shuffled``: striped
    after a shuffle. Raises :class:`FieldError`.
    """
    functions = volumes.size
    if load.drop_top >= functions:
        raise unfit("drop_top", f"less than the trace's {functions} functions", load.drop_top, "drop fewer")
    kept = np.ones(functions)
    kept[: load.drop_top] = 0.0
    notes: list[str] = []
    total = float(volumes.sum())
    if load.drop_top:
        share = float(volumes[: load.drop_top].sum()) / total
        notes.append(f"left out the {counted(load.drop_top, 'busiest function')} ({share:.1%} of all calls)")
    if load.cap_share is not None:
        notes.append(_cap(volumes, kept, load.cap_share))
    mapped = functions - load.drop_top
    places = np.arange(mapped, dtype=np.int64)
    if load.mapping == "block":
        chosen = places * models // mapped
    else:
        chosen = (rng.permutation(mapped) if load.mapping == "shuffled" else places) % models
    of_function = np.zeros(functions, dtype=np.int32)
    of_function[load.drop_top :] = chosen
    flow = np.bincount(of_function, weights=volumes * kept, minlength=models)
    hit = int(np.count_nonzero(np.bincount(chosen, minlength=models)))
    notes.append(
        f"mapping {load.mapping}: {counted(mapped, 'function')} to {hit} of {counted(models, 'model')}; "
        f"the busiest model gets {float(flow.max() / flow.sum()):.1%} of the calls"
    )
    return Assignment(of_function, kept, float(flow.sum()), tuple(notes))


def _cap(volumes: Floats, kept: Floats, share: float) -> str:
    """Reduce ``kept`` so that no function carries more than ``share`` of what is left."""
    alive = volumes * kept
    present = int(np.count_nonzero(alive))
    if share * present < 1:
        raise FieldError(
            "cap_share",
            f"expected at least 1 / {present}, for {present} functions, found {share:g}; raise it",
        )
    before = float(alive.sum())
    # The k busiest are cut to the same level; it is their share of a total that has shrunk with them.
    order = np.argsort(-alive, kind="stable")
    rest = before
    level, capped = before, 0
    for index in order.tolist():
        assert share * capped < 1, "one of the functions left is at most their sum"
        level = share * rest / (1.0 - share * capped)
        if alive[index] <= level * (1 + 1e-12):
            break
        rest -= float(alive[index])
        capped += 1
    if not capped:
        return f"cap of {share:.1%} of the calls per function: none reaches it"
    busiest = order[:capped]
    kept[busiest] *= level / alive[busiest]
    dropped = 1.0 - float((volumes * kept).sum()) / before
    cut = f"{counted(capped, 'function')} cut, {dropped:.1%} of all calls dropped"
    return f"cap of {share:.1%} of the calls per function: {cut}"


def counted(number: int, what: str) -> str:
    """A number and what it counts."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
