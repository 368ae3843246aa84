"""Which torch is here and what is compiled for; nothing of it imports torch in this process."""

from __future__ import annotations

import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from clockwork_serve.errors import install_advice
from clockwork_serve.store import ProblemError
from clockwork_serve.store.torch.target import resolved, torch_version

no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")


def test_torch_that_is_not_installed_is_a_problem_that_says_what_to_install():
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    with pytest.raises(ProblemError, match=r"not installed; .*pip install .*/clockwork-serve\[torch\]"):
        torch_version(missing)


@pytest.mark.skipif(util.find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_a_program_is_a_problem_and_the_others_are_served(shop):
    from tests.store.graphs import mlp

    shop.add("words", mlp())
    (shop.root / "program" / "1").mkdir(parents=True)
    (shop.root / "program" / "1" / "model.pt2").write_bytes(b"PK")
    served, problems = shop.compile()
    assert list(served) == ["words/1"]
    assert [(problem.model, problem.advice) for problem in problems] == [
        ("program", install_advice("clockwork-serve[torch]"))
    ]


def test_a_target_that_was_named_is_taken_as_it_is():
    assert [resolved(target) for target in ("cpu", "cuda:sm_90", "")] == ["cpu", "cuda:sm_90", ""]


@no_gpu
def test_without_a_gpu_the_cpu_is_compiled_for_unless_a_gpu_was_asked_for():
    assert resolved("auto") == "cpu"
    with pytest.raises(ProblemError, match="--torch-target cpu"):
        resolved("cuda")


def test_the_store_does_not_import_torch():
    import clockwork_serve.store.compiler
    import clockwork_serve.store.torch.compiler  # noqa: F401

    code = "import sys, clockwork_serve.store.compiler; sys.exit('torch' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
