"""The real models answer right in plain sessions; skipped where ``clockwork demo`` has not fetched them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.judgement import RecordedSend, open_plain
from clockwork_lab.demo.wheels import WHEELS
from clockwork_lab.demo.zoo import MODELS, available
from clockwork_serve.config import default_cache


def test_every_needed_file_is_in_a_wheel():
    offered = {member for wheel in WHEELS for member in wheel.files}
    for model in MODELS:
        assert offered.issuperset(model.needs), model.name


def test_the_zoo_is_as_large_and_as_varied_as_promised():
    assert len({model.kind for model in MODELS}) == len(MODELS) == 13
    assert sum(model.instances for model in MODELS) == 231


def test_without_files_no_model_is_available_but_those_that_need_none(tmp_path):
    assert available(Files(tmp_path)) == ()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_real_models_answer_right(model, tmp_path):
    files = Files(Path(os.environ.get("CLOCKWORK_CACHE") or default_cache(os.environ)) / "demo")
    if not all(files.path(member).is_file() for member in model.needs):
        pytest.skip(f"the files of {model.name} are not in {files.root}; `clockwork demo` fetches them")
    (tmp_path / "model.onnx").write_bytes(model.build(files))
    recorder = RecordedSend(open_plain(tmp_path))
    judgement = model.ask(files, recorder)
    assert judgement.ok, judgement.answer
