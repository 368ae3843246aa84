"""``clockwork explain``: why a request was refused, late or slow, and what would have changed that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clockwork_serve.cli.options import duration_ns, json_flag
from clockwork_serve.cli.screen import INTERRUPTED, Progress, interruptible, note, say, show_json
from clockwork_serve.errors import ClockworkError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from clockwork_serve.messages import Answer
    from clockwork_serve.sim.explain import Explanation
    from clockwork_serve.sim.survey import SurveyReport


class NotFound(ClockworkError):
    """The journal does not hold what was asked for; the message says what it holds."""


@click.command(epilog="What it says: clockwork docs explain (docs/use/explain.md)")
@click.argument("journal", metavar="JOURNAL")
@click.argument("request_id", metavar="[ID]", required=False)
@click.option("--refused", "which", flag_value="refused", help="All that were refused or failed, by cause.")
@click.option("--late", "which", flag_value="late", help="All that got no answer in time, by cause.")
@click.option(
    "--slow", "which", flag_value="slow",
    help="All that were answered in time, and took more than half of their SLO.",
)  # fmt: skip
@click.option("--since", metavar="TIME", help="Of them, those of the last TIME: 90s, 30m, 1h, 2d.")
@click.option(
    "--sample", type=click.IntRange(1, 10_000), default=20, metavar="N", show_default=True,
    help="On so many of them remedies are tried.",
)  # fmt: skip
@click.option(
    "--if", "changes", multiple=True, metavar="CHANGE",
    help="How it would have gone with this change, such as priority=1; may be given again.",
)  # fmt: skip
@click.option("--tenant", metavar="NAME", help="Only this tenant's requests, and no names of others' models.")
@json_flag
def explain(  # noqa: PLR0917 - click gives them by name
    journal: str, request_id: str | None, which: str | None, since: str | None, sample: int,
    changes: tuple[str, ...], tenant: str | None, as_json: bool,  # noqa: FBT001
) -> int:  # fmt: skip
    """Explain a request of JOURNAL, or all that were refused, late or slow.

    JOURNAL is what `clockwork serve --journal` or `clockwork simulate --journal` wrote, ID the request's id,
    as the answer and the log have it. Each remedy is tried: its surroundings are played again with it. So is
    each CHANGE: slo=MS, priority=1, devices=+1, memory=+SIZE, memory:DEVICE=+SIZE, without=MODEL,
    policy=NAME, traffic=TIMES, tenant:NAME=TIMES, model:NAME=TIMES; all that are given at once.
    """
    _check_asked(request_id, which, changes)
    path = Path(journal)
    from clockwork_serve.telemetry.journal import journal_bytes

    total = 1 + (journal_bytes(path) >> 20)
    try:
        with Progress("reading", quiet=as_json) as progress, interruptible() as stopped:

            def tell(done: int) -> None:
                progress.step(done >> 20, total, "MiB")

            def check() -> None:
                if stopped():
                    raise KeyboardInterrupt  # noqa: TRY301 - raised where it is called

            if request_id is not None:
                told: Explanation | SurveyReport = _one(
                    path, request_id, tenant, tell, check, changes=changes
                )
            else:
                from clockwork_serve.sim.survey import Which, survey

                told = survey(
                    path, Which(which or "refused"),
                    since_ns=None if since is None else duration_ns("since", since), tenant=tenant,
 sample=sample, tell=tell, stopped=stopped, check=check,
                )  # fmt: skip
    except KeyboardInterrupt:
        note("interrupted: nothing was found so far")
        return INTERRUPTED
    if as_json:
        show_json(told)
    else:
        for line in told.lines:
            say(line)
    return 0


def _check_asked(request_id: str | None, which: str | None, changes: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` where it is not clear which requests are asked about."""
    if (request_id is None) == (which is None):
        raise ConfigError(
            "ID: expected a request's id, or one of --refused, --late and --slow, found "
            f"{'both' if which else 'neither'}; give one of them"
        )
    if changes and request_id is None:
        raise ConfigError("if: expected the ID of a request with it; found none; give one")


def _one(
    path: Path, request_id: str, tenant: str | None, tell: Callable[[int], None], check: Callable[[], None],
    *, changes: tuple[str, ...],
) -> Explanation:  # fmt: skip
    from clockwork_serve.sim.explain import case_in, cases_of
    from clockwork_serve.sim.explain import explain as explained
    from clockwork_serve.sim.history import History, folder_of
    from clockwork_serve.telemetry import gateway_answer

    def told(done: int) -> None:
        tell(done)
        check()

    if folder_of(path).is_dir():  # an observer made an index and checkpoints
        found = case_in(History.open(path), request_id, check)
        cases = iter(() if found is None else (found,))
    else:
        cases = cases_of(path, {request_id}, tell=told)
    instead = gateway_answer(path, request_id)
    for case in cases:
        if tenant is None or case.request.tenant == tenant:
            return explained(case, viewer=tenant, changes=changes, check=check, instead=instead)
    raise NotFound(_not_found(path, request_id, tenant, instead))


def _not_found(path: Path, request_id: str, tenant: str | None, answer: Answer | None) -> str:
    from clockwork_serve.sim.survey import nearest_ids

    if answer is not None and tenant is None:  # a gateway's answer does not say whose request it was
        why = ": ".join(part for part in (str(answer.outcome), str(answer.reason), answer.message) if part)
        return f"{request_id}: its gateway {answer.gateway} ended it by itself ({why})"
    near = [] if tenant is not None else nearest_ids(path, request_id)
    like = f"nearest: {', '.join(near)}" if near else "none is like it"
    whose = "" if tenant is None else f" of tenant {tenant}"
    return (
        f"{request_id}: expected a request{whose} that reached the controller while {path} was written; "
        f"found none; {like}. What a gateway refuses by itself (too large, unknown, hopeless by the "
        "controller's last summary) never reaches it: the answer's own message says why"
    )
