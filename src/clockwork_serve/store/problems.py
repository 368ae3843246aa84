"""What is wrong with a model or a setting, as a record; never a reason to stop serving the others."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from msgspec import Struct

from clockwork_serve.errors import RepositoryError, printable

_SHOWN = 300


class Problem(Struct, frozen=True, kw_only=True):
    """Why one model (or one version of it) is not served, and what to do about it.

    ``model`` is empty where the repository as a whole is meant; ``version`` is empty where the model is.
    """

    model: str
    field: str
    expected: str
    found: str
    advice: str
    version: str = ""

    def __str__(self) -> str:
        where = f"model '{self.model}'" if self.model else "repository"
        if self.version:
            where += f" version {self.version}"
        return f"{where}: {self.field}: expected {self.expected}, found {self.found}; {self.advice}"


class Damage(Struct, frozen=True):
    """A file that was set aside: ``what`` is ``code``, ``weights`` or ``record``, ``found`` what is wrong."""

    what: str
    name: str
    found: str


class ProblemError(RepositoryError):
    """A :class:`Problem` on its way to whoever collects it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def problem(
    field: str, *, expected: str, found: object, advice: str, model: str = "", version: str = ""
) -> ProblemError:
    """A :class:`ProblemError`; all is shown shortened, and as text that can be printed and sent."""
    text = found if isinstance(found, str) else repr(found)
    return ProblemError(
        Problem(
            model=shown(model),
            version=version,
            field=shown(field),
            expected=shown(expected),
            found=shown(text),
            advice=shown(advice),
        )
    )


def shown(text: str) -> str:
    """Text of a stranger's, as short as a problem wants it."""
    return printable(text, _SHOWN)


def placed(error: ProblemError, *, model: str, version: str = "") -> ProblemError:
    """The same problem with the model (and version) it belongs to, where they were not known yet."""
    old = error.problem
    return ProblemError(
        Problem(
            model=old.model or model,
            version=old.version or version,
            field=old.field,
            expected=old.expected,
            found=old.found,
            advice=old.advice,
        )
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Advice for a word that is not known: the nearest one, or all of them."""
    names = sorted(known)
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{by_lower[near[0]]}'?"
    return f"known here: {', '.join(names)}" if names else "nothing is known here"
