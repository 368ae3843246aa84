"""Whom a dead worker counts against; and a machine that remembers everything and says who must be guilty."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from clockwork_serve.controller.quarantine import Suspect, Suspects

WINDOW_NS = 1000
NAMES = ("a", "b", "c", "code")


def lost(suspects: Suspects, *names: str, now_ns: int = 0, request: str = "") -> str | None:
    guilty = suspects.lost([Suspect(name, (request,) if request else ()) for name in names], now_ns)
    return None if guilty is None else guilty[0]


def test_the_third_loss_in_a_row_makes_guilty_and_tells_how_often_and_since_when() -> None:
    suspects = Suspects(3, WINDOW_NS)
    assert [lost(suspects, "a", now_ns=at) for at in (5, 6)] == [None, None]
    guilty = suspects.lost([Suspect("a")], 7)
    assert guilty is not None
    name, losses = guilty
    assert (name, len(losses), losses[0].at_ns) == ("a", 3, 5)
    assert suspects.losses == {}


def test_a_success_in_between_clears() -> None:
    suspects = Suspects(2, WINDOW_NS)
    assert lost(suspects, "a") is None
    suspects.succeeded("a")
    assert lost(suspects, "a") is None
    suspects.succeeded("b")
    assert lost(suspects, "a") == "a"


def test_no_success_clears_what_one_request_did_twice_alone() -> None:
    suspects = Suspects(3, WINDOW_NS)
    assert lost(suspects, "a", request="poison") is None
    suspects.succeeded("a")
    assert lost(suspects, "a", request="poison") is None
    suspects.succeeded("a")
    assert lost(suspects, "a", request="another") == "a"


def test_a_request_that_had_company_proves_nothing() -> None:
    suspects = Suspects(2, WINDOW_NS)
    assert suspects.lost([Suspect("a", ("r",)), Suspect("b")], 0) is None
    suspects.succeeded("a")
    suspects.succeeded("b")
    assert lost(suspects, "a", request="r") is None
    suspects.succeeded("a")
    assert suspects.losses == {}


def test_a_loss_counts_against_whom_most_is_known_of_already() -> None:
    suspects = Suspects(3, WINDOW_NS)
    assert lost(suspects, "killer", "bystander") is None
    assert lost(suspects, "killer", "another") is None
    assert {name: len(losses) for name, losses in suspects.losses.items()} == {"killer": 2, "bystander": 1}
    assert lost(suspects, "bystander", "killer") == "killer"


def test_of_two_that_were_always_together_the_first_is_guilty_and_explains_it_all() -> None:
    suspects = Suspects(3, WINDOW_NS)
    assert [lost(suspects, "runs", "loads") for _ in range(3)] == [None, None, "runs"]
    assert suspects.losses == {}


def test_losses_too_far_apart_have_nothing_to_do_with_each_other() -> None:
    suspects = Suspects(2, WINDOW_NS)
    assert lost(suspects, "a", now_ns=0) is None
    assert lost(suspects, "a", now_ns=WINDOW_NS) is None
    assert lost(suspects, "a", now_ns=WINDOW_NS + 1) == "a"


def test_with_0_nobody_is_ever_guilty() -> None:
    suspects = Suspects(0, WINDOW_NS)
    assert [lost(suspects, "a") for _ in range(9)] == [None] * 9


class SuspectsMachine(RuleBasedStateMachine):
    """The oracle keeps the whole story, and reads from it, anew each time, what counts against whom."""

    @initialize(after=st.integers(1, 4))
    def start(self, after: int) -> None:
        self.after = after
        self.suspects = Suspects(after, WINDOW_NS)
        self.now_ns = 0
        self.crashes: set[int] = set()
        """Places in the story of losses that were crashes."""
        self.story: list[tuple[str, int, tuple[str, ...], str]] = []
        """("lost", when, against whom, the request that was alone), ("good"/"gone", 0, who, "")."""

    @rule(step=st.integers(1, 400))
    def wait(self, step: int) -> None:
        self.now_ns += step

    @rule(name=st.sampled_from(NAMES))
    def succeed(self, name: str) -> None:
        self.suspects.succeeded(name)
        self.story.append(("good", 0, (name,), ""))

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        self.suspects.forget(name)
        self.story.append(("gone", 0, (name,), ""))

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True), number=st.integers(0, 2)
    )
    def lose(self, names: list[str], number: int) -> None:
        self.lose_one(names, number)

    @rule(name=st.sampled_from(NAMES), number=st.integers(0, 2), cleared=st.booleans())
    def crash(self, name: str, number: int, cleared: bool) -> None:
        """A worker dies and, as is told later, by a crash; in between it may have been cleared."""
        at = len(self.story)
        self.lose_one([name], number)
        if cleared:
            self.succeed(name)
        assert self.suspects.crashed("w")
        self.crashes.add(at)
        assert not self.suspects.crashed("w")
        assert len(self.suspects.losses.get(name, ())) == len(self.against(name))

    @rule(name=st.sampled_from(NAMES))
    def be_too_late(self, name: str) -> None:
        """How a worker ended is told when the next one is up, or of one that nobody knows."""
        self.lose_one([name], 2)
        self.suspects.joined("w")
        assert not self.suspects.crashed("w")

    def lose_one(self, names: list[str], number: int) -> None:
        request = f"{names[0]}-{number}"
        counts = {name: len(self.against(name)) for name in names}
        blamed = tuple([name for name in names if counts[name] == max(counts.values())])
        self.story.append(("lost", self.now_ns, blamed, request if len(names) == 1 else ""))
        expected = next((name for name in blamed if len(self.against(name)) >= self.after), None)
        count = 0 if expected is None else len(self.against(expected))
        if expected is not None:
            explained = self.against(expected)
            for at in explained:
                kind, when, _, alone = self.story[at]
                self.story[at] = (kind, when, (), alone)
            self.story.append(("gone", 0, (expected,), ""))  # it starts anew
        guilty = self.suspects.lost([Suspect(name, (request,)) for name in names], self.now_ns, "w")
        assert (None if guilty is None else (guilty[0], len(guilty[1]))) == (expected and (expected, count))
        for name in NAMES:
            assert len(self.suspects.losses.get(name, ())) == len(self.against(name))

    def against(self, name: str) -> list[int]:
        """Places in the story of the losses that count against a name now."""
        lasting = self.proven(name)
        counting: list[int] = []
        for at, (kind, when, names, _) in enumerate(self.story):
            if kind == "gone" and name in names:
                counting = []
                lasting = {one for one in lasting if one > at}
            elif kind == "good" and name in names:
                counting = [one for one in counting if one in lasting]
            elif kind == "lost" and name in names and when > self.now_ns - WINDOW_NS:
                counting.append(at)
        return counting

    def proven(self, name: str) -> set[int]:
        """Losses whose request was alone in the one before or after, too."""
        found: set[int] = set()
        before: dict[str, int] = {}
        for at, (kind, when, names, alone) in enumerate(self.story):
            if kind == "gone" and name in names:
                before = {}
            elif kind == "lost" and alone and name in names:
                if alone in before and when - self.story[before[alone]][1] < WINDOW_NS:
                    found |= {at, before[alone]}
                before[alone] = at
                if at in self.crashes:
                    found.add(at)
        return found


SuspectsMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSuspectsMachine = SuspectsMachine.TestCase
