"""The tiny models answer right, and the repository in ``examples/models`` is what the code writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clockwork_lab.demo import tiny
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.judgement import RecordedSend, open_plain
from clockwork_serve.store import Cache, Repository, StoreConfig, compile_all

EXAMPLES = Path(__file__).parents[3] / "examples" / "models"


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_examples_are_what_the_code_writes(tmp_path):
    tiny.write(tmp_path)
    written = contents(tmp_path)
    assert written == contents(EXAMPLES)
    assert sum(map(len, written.values())) < 200_000


@pytest.mark.parametrize("model", tiny.MODELS, ids=lambda model: model.name)
def test_each_answers_right(model, tmp_path):
    recorder = RecordedSend(open_plain(EXAMPLES / model.name / "1"))
    judgement = model.ask(Files(tmp_path), recorder)
    assert judgement.ok, judgement.answer
    assert recorder.calls
    assert recorder.typical_ms() > 0


@pytest.mark.parametrize("model", tiny.MODELS, ids=lambda model: model.name)
def test_a_wrong_answer_is_judged_wrong(model, tmp_path):
    right = open_plain(EXAMPLES / model.name / "1")

    def wrong(inputs):
        return {
            name: np.flip(array, -1) * 0 if array.dtype != object else array
            for name, array in right(inputs).items()
        }

    assert not model.ask(Files(tmp_path), wrong).ok


def test_all_can_be_served(tmp_path):
    config = StoreConfig(cache_dir=str(tmp_path))
    store = Cache(tmp_path)
    served, problems = compile_all(Repository(EXAMPLES, config), store)
    store.close()
    assert problems == []
    assert [(each.model.name, each.model.max_batch_size) for each in served] == [
        ("add_sub", 16), ("mlp", 16), ("words", 8),
    ]  # fmt: skip
