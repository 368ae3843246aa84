"""Two revisions compared: what is slower is found, what is equal is not, what cannot be compared says so."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import versus
from benchmarks.versus import (
    LIMIT,
    Asked,
    Compared,
    Tree,
    VersusError,
    all_rounds,
    compare,
    conclude,
    direction,
    judge,
    numbers,
    spread,
)

FAKE = '''"""A benchmark whose figures are made up: they depend on its tree and on how often it ran."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import clockwork_serve

ran = Path(sys.argv[1])
count = len(ran.read_text()) if ran.exists() else 0
ran.write_text("x" * (count + 1))
noise = 1 + 0.01 * (count * 7 % 5 - 2) / 2
invalid = "others worked" if count in map(int, sys.argv[2].split(",")) else ""
figures = {"took_ms": 10 * clockwork_serve.COST * noise, "good_per_s": 100 / clockwork_serve.COST * noise}
print("measured")
Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps({"figures": figures, "invalid": invalid}))
sys.exit(2 if invalid else 0)
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one revision, ``HEAD``, of a program and its benchmark."""
    found = tmp_path / "project"
    (found / "src" / "clockwork_serve").mkdir(parents=True)
    (found / "benchmarks").mkdir()
    (found / "src" / "clockwork_serve" / "__init__.py").write_text("COST = 1.0\n")
    (found / "benchmarks" / "fake.py").write_text(FAKE)
    (found / "pyproject.toml").write_text('[project]\nname = "fake"\ndependencies = ["one>=1"]\n')
    (found / "constraints.txt").write_text("one==1.0\n")
    (found / ".gitignore").write_text("build/\n__pycache__/\n")
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "first")):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=found, check=True)
    return found


def asked(root: Path, invalid: str = "-1", **more: object) -> Asked:
    return Asked("fake", (str(root.parent / "ran"), invalid), **({"rounds": 3} | more))  # type: ignore[arg-type]


def change(root: Path, cost: float) -> None:
    (root / "src" / "clockwork_serve" / "__init__.py").write_text(f"COST = {cost}\n")


@pytest.mark.parametrize(("cost", "verdict"), [(1.0, "passed"), (0.5, "passed"), (1.3, "missed")])
def test_a_working_tree_that_costs_more_is_slower_in_each_figure(
    root: Path, cost: float, verdict: str
) -> None:
    change(root, cost)
    outcome = judge(root, "HEAD", asked(root))
    assert outcome.verdict == verdict
    assert {one.question: one.good for one in outcome.verdicts} == {
        "took_ms": verdict == "passed", "good_per_s": verdict == "passed",
    }  # fmt: skip
    assert outcome.figures["took_ms"]["ratio"] == pytest.approx(cost, rel=0.03)
    assert len((root.parent / "ran").read_text()) == 9, "three rounds of A, B and A2"
    assert not list((root / "build" / "versus").glob("working-*")), "the copy is removed"


def test_files_that_git_does_not_know_yet_are_part_of_the_working_tree(root: Path) -> None:
    change(root, 1.0)
    (root / "src" / "clockwork_serve" / "cost.py").write_text("COST = 2.0\n")
    (root / "src" / "clockwork_serve" / "__init__.py").write_text("from clockwork_serve.cost import COST\n")
    assert judge(root, "HEAD", asked(root)).verdict == "missed"


def test_a_round_that_proves_nothing_is_repeated(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = judge(root, "HEAD", asked(root, invalid="1"))
    assert outcome.verdict == "passed"
    said = capsys.readouterr().out
    assert "proves nothing: others worked" in said
    assert len((root.parent / "ran").read_text()) == 2 + 9


def test_a_revision_of_one_package_is_compared_with_a_workspace_of_three(root: Path) -> None:
    package = root / "packages" / "clockwork-serve"
    package.mkdir(parents=True)
    (root / "src").rename(package / "src")
    (root / "pyproject.toml").write_text("[tool.ruff]\n")
    (package / "pyproject.toml").write_text(
        '[project]\nname = "fake"\ndependencies = ["clockwork-client==2", "one>=1"]\n'
    )

    assert judge(root, "HEAD", asked(root)).verdict == "passed"


def test_rounds_that_never_prove_anything_end(root: Path) -> None:
    outcome = judge(root, "HEAD", asked(root, invalid=",".join(map(str, range(99)))))
    assert outcome.verdict == "invalid"
    assert "others worked" in outcome.invalid
    assert len((root.parent / "ran").read_text()) == 3, "as many as there are rounds"
    taken = judge(root, "HEAD", asked(root, invalid=",".join(map(str, range(99))), accept_invalid=True))
    assert taken.verdict == "passed"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("constraints.txt", "one==1.1\n", "constraints.txt: expected the same in both trees, found one==1.0"),
        ("pyproject.toml", '[project]\nname = "fake"\n', "dependencies in pyproject.toml: .* found one>=1"),
        ("benchmarks/fake.py", "import nothing_of_that_name\n", "exit status 1 .*nothing_of_that_name"),
        ("src/clockwork_serve/__init__.py", "1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_trees_that_cannot_be_compared_say_why(root: Path, file: str, text: str, words: str) -> None:
    (root / file).write_text(text)
    with pytest.raises(VersusError, match=f"(?s){words}"):
        judge(root, "HEAD", asked(root))


def test_another_python_for_the_revision_is_nobodys_business_but_the_users(root: Path) -> None:
    (root / "constraints.txt").write_text("one==1.1\n")
    assert judge(root, "HEAD", asked(root), python=sys.executable).verdict == "passed"


@pytest.mark.parametrize("name", ["fake", "qa.fake", "benchmarks.fake"])
def test_a_benchmark_that_moved_to_another_folder_is_the_same_by_either_name(root: Path, name: str) -> None:
    (root / "qa").mkdir()
    (root / "benchmarks" / "fake.py").rename(root / "qa" / "fake.py")
    given = asked(root)
    assert judge(root, "HEAD", replace(given, benchmark=name)).verdict == "passed"


def test_what_is_not_there_is_named(root: Path) -> None:
    with pytest.raises(
        VersusError, match=r"--python: expected a Python to run A with, found none at /.*/nowhere$"
    ):
        judge(root, "HEAD", asked(root), "nowhere")
    with pytest.raises(VersusError, match="git rev-parse"):
        judge(root, "no-such-revision", asked(root))
    with pytest.raises(
        VersusError, match=r"A \(HEAD\): expected other in benchmarks, qa, comparison; found none"
    ):
        judge(root, "HEAD", Asked("other"))
    with pytest.raises(VersusError, match=r"--figure no: .* found good_per_s, took_ms"):
        judge(root, "HEAD", asked(root, figures=("no",)))


def test_every_side_is_first_as_often_as_the_others(root: Path) -> None:
    said: list[str] = []
    tree = Tree("it", root, sys.executable, root)
    (root / "src" / "clockwork_serve" / "__init__.py").touch()
    all_rounds(asked(root), {"A": tree, "B": tree, "A2": tree}, lambda text, **_: said.append(text))
    sides = [line.split(", ")[1].split(":")[0] for line in said]
    assert sides == ["A", "B", "A2", "B", "A2", "A", "A2", "A", "B"]


def test_ctrl_c_keeps_the_rounds_that_are_complete_if_they_are_enough(root: Path) -> None:
    tree = Tree("it", root, sys.executable, root)
    (root / "src" / "clockwork_serve" / "__init__.py").touch()

    def stops_in(number: int) -> Callable[..., None]:
        def say(text: str, **_: object) -> None:
            if f"round {number} of" in text:
                raise KeyboardInterrupt

        return say

    trees = {"A": tree, "B": tree, "A2": tree}
    rounds, invalid = all_rounds(asked(root, rounds=9), trees, stops_in(4))
    assert (len(rounds), invalid) == (3, "")
    with pytest.raises(KeyboardInterrupt):
        all_rounds(asked(root), trees, stops_in(3))


def test_ctrl_c_leaves_no_process_and_no_copy(root: Path) -> None:
    (root / "benchmarks" / "fake.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), 2)\n"
        "os.kill(os.getpid(), 2)\n"
        "time.sleep(100)\n"
    )
    code = (
        "import sys, pathlib; from benchmarks import versus; versus.ROOT = pathlib.Path(sys.argv.pop(1)); "
        "sys.exit(versus.main())"
    )
    arguments = [str(root), "--rounds", "3", "HEAD", "fake", str(root.parent / "ran"), "-1"]
    who = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, "commit", "-qam", "second"], cwd=root, check=True)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr == "\nstopped; nothing was judged\n"
    assert not Path(f"/proc/{(root.parent / 'ran').read_text()}").exists()
    assert not list((root / "build" / "versus").glob("working-*"))


def test_numbers_are_found_wherever_they_stand() -> None:
    figures = {
        "load": [{"name": "m", "batch": 4, "ours_ms": 2.5}, {"name": "n", "batch": 1, "ours_ms": 1}],
        "shots": [{"us": 3, "bad": 0}, {"us": 1, "bad": 1}, {"us": 2}],
        "list": [5, 7, 6], "none": None, "yes": True, "word": "x", "nan": float("nan"), "empty": [],
    }  # fmt: skip
    assert numbers(figures) == {"load/m 4/ours_ms": 2.5, "load/n 1/ours_ms": 1, "shots/us": 2, "list": 6}


@pytest.mark.parametrize(
    ("name", "higher"),
    [
        ("6x1000/warm/better_half_us", False), ("1 kB/median/ours/per_s", True), ("run/rps", True),
        ("Client ms/0.5", False), ("us_per_request_by_part/world", False), ("run/infers", None),
        ("load/m 4/ours_ms", False), ("goodput", True), ("prediction_error/p50", None), ("odd", True),
    ],
)  # fmt: skip
def test_a_name_tells_which_direction_is_better(name: str, higher: bool | None) -> None:
    assert direction(name, Asked("fake", higher=("odd",))) is higher


def pairs(dice: random.Random, rounds: int, factor: float, noise: float) -> list[dict[str, dict[str, float]]]:
    """Made-up rounds with four figures; the machine's own speed changes by up to two times between them."""
    found = []
    for _ in range(rounds):
        speed = dice.uniform(1, 2)
        costs = {"A": 1.0, "B": factor, "A2": 1.0}
        found.append(
            {
                side: {f"f{at}_ms": speed * cost * dice.lognormvariate(0, noise) for at in range(4)}
                for side, cost in costs.items()
            }
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("rounds", "noise"), [(5, 0.003), (5, 0.03), (8, 0.1)])
def test_what_is_equal_seldom_seems_slower(rounds: int, noise: float) -> None:
    dice = random.Random(3)
    tries = 40
    wrong = sum(
        any(one.slower for one in compare(Asked("fake"), pairs(dice, rounds, 1.0, noise)))
        for _ in range(tries)
    )
    assert wrong <= 0.15 * tries


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounds", "noise", "factor"), [(5, 0.003, 1.03), (5, 0.02, 1.1), (9, 0.03, 1.12), (9, 0.1, 1.5)]
)
def test_what_costs_more_is_found(rounds: int, noise: float, factor: float) -> None:
    dice = random.Random(3)
    tries = 40
    found = sum(
        any(one.slower for one in compare(Asked("fake"), pairs(dice, rounds, factor, noise)))
        for _ in range(tries)
    )
    assert found >= 0.9 * tries


def test_one_disturbed_round_neither_accuses_nor_excuses() -> None:
    calm = {"A": [1.0] * 5, "B": [1.0] * 4 + [9.0], "A2": [1.0] * 5}
    assert not Compared("x_ms", higher=False, values=calm).slower
    same = [1.001, 0.999, 1.002, 1.0, 3.0]
    assert spread(same, 0.05) < LIMIT
    assert spread([1.0, 1.5, 0.7, 1.6, 0.6], 0.05) > 1.4


def test_a_revision_that_differs_from_itself_proves_nothing() -> None:
    values = {"A": [1.0] * 5, "B": [1.0] * 5, "A2": [1.9, 0.5, 2.0, 0.4, 1.8]}
    rounds = [{side: {"x_ms": values[side][at]} for side in values} for at in range(5)]
    outcome = conclude(Asked("fake"), compare(Asked("fake"), rounds))
    assert "x_ms: two runs of one revision differ" in outcome.invalid


def test_the_demo_is_a_benchmark_too(tmp_path: Path) -> None:
    tree = Tree("A", tmp_path, "python", tmp_path / "cache")
    words = versus.command(Asked("demo", ("--seconds", "5")), tree, tmp_path / "r")
    assert words == [
        "python", "-m", "clockwork_serve", "demo", "--cache", str(tmp_path / "cache"), "--seconds", "5",
        "--json", str(tmp_path / "r"),
    ]  # fmt: skip
    report = {"models": [{"name": "m", "ok": 3, "p50_ms": 2.0}, {"name": "n", "ok": 4, "p50_ms": None}]}
    figures = numbers(versus.demo_figures(report))
    assert figures == {"ok": 7, "models/m/ok": 3, "models/n/ok": 4, "models/m/p50_ms": 2.0}
    assert json.dumps(figures)
    assert os.environ["PATH"] == tree.environment()["PATH"]
