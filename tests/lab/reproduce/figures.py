"""A small made-up figure that tests draw, print and read back."""

from __future__ import annotations

from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, Series, SeriesRole, points

PAPER = Series(name="published", role=SeriesRole.PAPER, points=points([(10, 140), (25, 742)]))
OURS = Series(name="default", role=SeriesRole.DEFAULT, points=points([(10, 1 / 3), (50, None)]))
LIMIT = Series(name="limit", role=SeriesRole.LIMIT, points=points([(10, 681.4)]))

MET = PaperClaim(name="goodput", paper=140, ours=650, sense=">=", target=600)
MISSED = PaperClaim(name="agreement", paper=801, ours=700, sense="+-", target=801, tolerance=80.1)


def figure(panels: int = 2) -> Figure:
    panel = Panel(name="goodput", x_label="SLO (ms)", y_label="requests/s", series=(PAPER, OURS, LIMIT))
    other = Panel(name="latency", x_label="SLO (ms)", y_label="ms", series=(OURS,), x_log=True, y_log=True)
    return Figure(
        figure="fig5",
        title="a title",
        question="a question?",
        setup={"seed": 1, "workload": ["a note"]},
        panels=(panel, other)[:panels],
        claims=(MET, MISSED),
        notes=("something to know",),
    )
