"""Lines of the keys of a TOML file."""

from __future__ import annotations

from clockwork_serve.workload.tables import lines_of

TEXT = '''\
name = "x"        # not = a key
text = """
seconds = 3
"""
[cluster]   # the table
  "zoo" = 1
[[ loads ]]
name = "[[loads]]"
a.b = 1
[loads.slo_ramp]
every_s = 1
[[loads]]
models = [
  "a = b",
]
name = "second"
'''


def test_keys_are_found_by_their_paths() -> None:
    assert lines_of(TEXT) == {
        "name": 1, "text": 2, "cluster": 5, "cluster.zoo": 6, "loads[0]": 7, "loads[0].name": 8,
        "loads[0].a": 9,
        "loads[0].slo_ramp": 10, "loads[0].slo_ramp.every_s": 11, "loads[1]": 12, "loads[1].models": 13,
        "loads[1].name": 16,
    }  # fmt: skip


def test_line_ends_of_another_system_do_not_matter() -> None:
    assert lines_of(TEXT.replace("\n", "\r\n")) == lines_of(TEXT)
