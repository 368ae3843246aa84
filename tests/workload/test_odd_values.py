"""Whatever a scenario or a trace holds, it is used or refused with a place; nothing else ever happens."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.errors import ConfigError
from clockwork_serve.workload.scenario import LoadTable, read_scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.trace_files import read_minutes, rows_2021, rows_timestamps, survey
from tests.workload.scenarios import WHOLE

ODD = (
    "-1", "0", "1", "3", "50", "1e-9", "1e300", "-1e300", "inf", "nan", "true", '""', '"x"', '"*"', "[]",
    "[1]", '["m"]', '["m", "m"]', "{}", "{ a = 1 }", "{ every_s = 1, factor = 2 }", "1979-05-27", "9" * 20,
    "{ every_s = 1, add = -3 }", "{ every_s = 1, add = 1e300 }", "{ every_s = 1e-3, factor = 1e300 }",
    '"uniform"', '"zipf"', '"exact"',
)  # fmt: skip
KINDS = {
    "poisson": "rate_rps = 50\n", "gamma": "rate_rps = 50\ncv = 2\n", "fixed": "rate_rps = 50\n",
    "closed": "concurrency = 2\n", "generated": "functions = 300\n", "timestamps": 'trace = "t.csv"\n',
    "azure": 'trace = "a.csv"\n',
}  # fmt: skip
SMALL = """\
name = "small"
seconds = 3
[[models]]
name = "m"
kind = "k"
copies = 5
[[loads]]
name = "l"
models = ["m"]
"""
AZURE = b"HashOwner,HashApp,HashFunction,Trigger,5,6,7\r\no,a,f,http,1,2,3\no,a,g,http,4,0,6\n"
AZURE_2021 = b"app,func,end_timestamp,duration\na,f,10.5,0.25\na,g,11.5,3\n"
TIMES = b"TIMESTAMP,x\n2023-11-16 18:15:46.6805900,1\r\n2023-11-16 18:15:47.0000000,2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "a.csv").write_bytes(AZURE)
    (folder / "t.csv").write_bytes(TIMES)
    return folder


def used_or_refused(file: Path) -> bool:
    """Whether a scenario was used; a refusal names the file."""
    try:
        workload = build(read_scenario(file), 1)
    except ConfigError as error:
        assert str(error).startswith((f"{file}:", f"{file.parent}/")), str(error)  # noqa: PT017
        return False
    for arrivals in islice(workload.open(), 2):
        assert arrivals.times_ns == sorted(arrivals.times_ns)
    return True


FIELDS = re.findall(r"^(\w+) = (.*)$", WHOLE, re.MULTILINE)


@settings(max_examples=150)
@given(field=st.sampled_from(FIELDS), odd=st.sampled_from(ODD))
def test_any_value_in_a_whole_scenario_is_used_or_refused(folder, field, odd) -> None:
    name, value = field
    file = folder / "whole.toml"
    text = WHOLE.replace(f"{name} = {value}", f"{name} = {odd}", 1)
    file.write_text(text.replace('"day1.csv", "day2.csv.gz"', '"a.csv"'))

    used_or_refused(file)


@settings(max_examples=250)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    name=st.sampled_from(LoadTable.__struct_fields__[3:]),
    odd=st.sampled_from(ODD),
)
def test_any_value_in_any_field_of_a_load_is_used_or_refused(folder, kind, name, odd) -> None:
    file = folder / "load.toml"
    plain = re.sub(rf"^{name} = .*\n", "", KINDS[kind], flags=re.MULTILINE)
    file.write_text(f'{SMALL}arrivals = "{kind}"\n{plain}{name} = {odd}\n')

    used_or_refused(file)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_load_of_each_kind_is_used(folder, kind) -> None:
    file = folder / "plain.toml"
    file.write_text(f'{SMALL}arrivals = "{kind}"\n{KINDS[kind]}')

    assert used_or_refused(file)


@settings(max_examples=200)
@given(
    which=st.sampled_from(["azure", "azure_2021", "times"]),
    place=st.floats(0, 1, exclude_max=True),
    length=st.integers(0, 8),
    put=st.binary(max_size=4)
    | st.sampled_from([b",", b"\r", b"\n", b"-", b"9" * 30, b"\x00", b"e5", b".", b"\xff"]),
)
def test_any_damage_to_a_trace_is_used_or_refused(tmp_path_factory, which, place, length, put) -> None:
    text = {"azure": AZURE, "azure_2021": AZURE_2021, "times": TIMES}[which]
    at = int(place * len(text))
    file = tmp_path_factory.mktemp("damage") / "t.csv"
    file.write_bytes(text[:at] + put + text[at + length :])
    try:
        if which == "azure":
            assert read_minutes([file], 0, None, 3).volumes.sum() >= 0
        else:
            rows = rows_2021 if which == "azure_2021" else rows_timestamps
            assert survey(file, lambda: rows(file), 0, None).volumes.sum() > 0
    except ConfigError as error:
        assert str(error).startswith(f"{file}:")  # noqa: PT017
