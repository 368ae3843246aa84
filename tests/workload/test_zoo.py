"""The table of the paper's models, and what a user's own table may and may not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import MIB, ms
from clockwork_serve.workload.zoo import Zoo, row_of

HEADER = "model,weights_mb,load_ms,infer_b1_ms,infer_b3_ms"


def table(folder: Path, *lines: str) -> Path:
    path = folder / "own.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_v100_table_is_the_papers() -> None:
    zoo = Zoo.read("v100")
    paper = zoo.paper_models()

    assert (len(zoo.models), len(paper)) == (64, 61)
    assert sum(model.rounded for model in zoo.models.values()) == 29
    assert sum(model.weights_bytes for model in paper) / len(paper) == pytest.approx(125e6, rel=0.01)
    assert sum(model.load_ns for model in paper) / len(paper) == pytest.approx(ms(10.1), rel=0.01)
    for size, mean_ms in ((1, 4.15), (8, 14.8), (16, 25.7)):
        assert sum(model.infer_ns[size] for model in paper) / len(paper) == pytest.approx(
            ms(mean_ms), rel=0.01
        )


def test_resnet50_v2_is_as_the_authors_print_it() -> None:
    row = Zoo.read("v100")["resnet50_v2"]

    assert row.infer_ns == {1: ms(2.73), 2: ms(4.05), 4: ms(5.87), 8: ms(9.93), 16: ms(17.3)}
    assert (row.weights_bytes, row.load_ns, row.rounded) == (102_200_000, ms(8.32), False)
    assert -(-row.weights_bytes // (16 * MIB)) == 7


def test_the_seed_table_is_slower_than_the_measured_one() -> None:
    measured, seed = Zoo.read("v100"), Zoo.read("v100_seed")

    assert len(seed.models) == 3
    for kind, row in seed.models.items():
        assert row.load_ns > measured[kind].load_ns
        assert all(row.infer_ns[size] > measured[kind].infer_ns[size] for size in row.infer_ns)


def test_a_profile_loads_its_own_weights_in_the_rows_time() -> None:
    zoo = Zoo.read("v100")

    for kind, row in zoo.models.items():
        profile = zoo.profile(kind)
        assert profile.load_ns(row.weights_bytes) == row.load_ns
        assert profile.infer_ns == row.infer_ns
        assert 0 <= profile.load_base_ns < 1000


def test_records_of_one_kind_share_a_code_and_keep_their_weights_apart() -> None:
    zoo = Zoo.read("v100")
    code = zoo.code("resnet18_v1", 8)
    first, second = (zoo.model(name, "resnet18_v1", 8) for name in ("a", "b"))

    assert code.batch_sizes == first.batch_sizes == (1, 2, 4, 8)
    assert first.code_id == second.code_id == code.code_id
    assert first.weights.weights_id != second.weights.weights_id
    assert (first.key, first.max_batch_size) == ("a/1", 8)
    assert [spec.row_bytes for spec in (*code.inputs, *code.outputs)] == [602_000, 4_000]


def test_a_table_of_ones_own_may_have_other_batch_sizes_and_gaps(tmp_path: Path) -> None:
    zoo = Zoo.read(table(tmp_path, "# mine", HEADER, "", "small,1.5,0.2,0.5,", "large,100,9,3,7.5"))

    assert zoo.name == "own"
    assert zoo["small"].infer_ns == {1: ms(0.5)}
    assert zoo["large"].infer_ns == {1: ms(3), 3: ms(7.5)}
    assert zoo["large"].in_paper
    assert zoo["small"].input_bytes == 0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((HEADER, "m,1,1,0,2"), r"own.csv:2: infer_b1_ms: expected a number above 0; found '0'"),
        ((HEADER, "m,1,1,,2"), r"own.csv:2: infer_b1_ms: expected a number above 0; found ''"),
        ((HEADER, "m,1,nan,1,2"), r"own.csv:2: load_ms: .*found 'nan'"),
        ((HEADER, "m,-3,1,1,2"), r"own.csv:2: weights_mb: .*found '-3'"),
        ((HEADER, "# c", "m,1,1,1"), r"own.csv:3: expected 5 fields as in the header, found 4"),
        ((HEADER, "a b,1,1,1,2"), r"own.csv:2: model: .*found 'a b'"),
        ((HEADER, "m,1,1,1,2", "m,1,1,1,2"), r"own.csv:3: model: .*'m' again"),
        (
            (HEADER + ",in_paper", "m,1,1,1,2,maybe"),
            r"own.csv:2: in_paper: expected yes or no; found 'maybe'",
        ),
        ((HEADER + ",precision", "m,1,1,1,2,so"), r"own.csv:2: precision: .*found 'so'"),
        ((HEADER + ",speed", "m,1,1,1,2,3"), r"own.csv:1: header: .*found 'speed'"),
        ((HEADER + ",load_ms", "m,1,1,1,2,3"), r"own.csv:1: header: .*load_ms twice"),
        (("model,weights_mb,infer_b1_ms", "m,1,1"), r"own.csv:1: header: expected a column load_ms"),
        ((HEADER,), r"own.csv: expected at least one row"),
        (("# only a comment",), r"own.csv: expected at least one row"),
    ],
)
def test_a_bad_table_names_file_line_and_field(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Zoo.read(table(tmp_path, *lines))


def test_a_measured_model_is_a_row_that_reads_back(tmp_path: Path) -> None:
    v100 = Zoo.read("v100")
    file = tmp_path / "mine.json"
    model, code, profile = (
        v100.model("resnet50", "resnet50_v2"), v100.code("resnet50_v2"), v100.profile("resnet50_v2"),
    )  # fmt: skip
    row = row_of("resnet50+", model, code, profile)
    file.write_text(json.dumps({"tables": {"cpu": [row]}, "profiles": [], "problems": []}))
    zoo = Zoo.read(file)

    found, meant = zoo["resnet50+"], v100["resnet50_v2"]
    assert (zoo.name, list(zoo.models)) == ("mine", ["resnet50+"])
    assert (found.infer_ns, found.load_ns, found.weights_bytes) == (
        meant.infer_ns, meant.load_ns, meant.weights_bytes,
    )  # fmt: skip
    assert (found.input_bytes, found.output_bytes) == (meant.input_bytes, meant.output_bytes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", r"own.json: expected what clockwork profile --json prints, found"),
        ('{"profiles": []}', r"own.json: expected what clockwork profile --json prints, found .*`tables`"),
        ('{"tables": {}}', r"own.json: tables: expected those of one kind of device, found none"),
        ('{"tables": {"cpu": [], "torch-cpu": []}}', r"found cpu, torch-cpu; profile with one --device"),
        ('{"tables": {"cpu": []}}', r"own.json: expected at least one row, found none"),
        (
            '{"tables": {"cpu": [{"model": "m"}]}}',
            r"tables\[cpu\]\[0\]: header: expected a column weights_mb",
        ),
        (
            '{"tables": {"cpu": [{"model": "m", "weights_mb": 1, "load_ms": -1, "infer_b1_ms": 1}]}}',
            r"tables\[cpu\]\[0\]: load_ms: expected a number above 0; found '-1",
        ),
    ],
)
def test_a_bad_profile_names_file_and_field(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "own.json").write_text(content)

    with pytest.raises(ConfigError, match=said):
        Zoo.read(tmp_path / "own.json")


def test_a_table_or_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"expected a .csv or .json file, or one of v100, v100_seed; found 'a100'"
    ):
        Zoo.read("a100")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        Zoo.read(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"expected a model of zoo v100 \(.*resnet50_v2.*found 'resnet50'"):
        Zoo.read("v100")["resnet50"]
