"""Requests over HTTP that infer nothing: health, descriptions, statistics, control, settings, any path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tests.end_to_end.triton.asking import Http

COUNTED = b'{"inputs":[{"name":"X","shape":[1,1],"datatype":"FP32","data":[1]}]}'
WRONG = b'{"inputs":[{"name":"Z","shape":[1,1],"datatype":"FP32","data":[1]}]}'

PATHS = Path(__file__).with_name("paths.txt").read_text(encoding="utf-8").splitlines()
"""Verbs and paths, asked for as they stand, without a body."""

POSTS = (
    ("index: no body", "/v2/repository/index", b""),
    ("index: {}", "/v2/repository/index", b"{}"),
    ("index: ready true", "/v2/repository/index", b'{"ready":true}'),
    ("index: ready false", "/v2/repository/index", b'{"ready":false}'),
    ("index: ready is a text", "/v2/repository/index", b'{"ready":"yes"}'),
    ("index: no JSON", "/v2/repository/index", b"ready"),
    ("index: a list", "/v2/repository/index", b"[]"),
    ("index: unknown field", "/v2/repository/index", b'{"nope":1}'),
    ("index: of a named repository", "/v2/repository/nosuch/index", b"{}"),
    ("load: a model that is served", "/v2/repository/models/spare/load", b"{}"),
    ("load: no body", "/v2/repository/models/spare/load", b""),
    ("load: unknown model", "/v2/repository/models/nosuch/load", b"{}"),
    ("load: source is no Python", "/v2/repository/models/later/load", b"{}"),
    ("load: no JSON", "/v2/repository/models/spare/load", b"please"),
    ("load: a list", "/v2/repository/models/spare/load", b"[1]"),
    ("load: parameters are a list", "/v2/repository/models/spare/load", b'{"parameters":[1]}'),
    ("load: unknown parameter", "/v2/repository/models/spare/load", b'{"parameters":{"nope":"x"}}'),
    ("load: config is no JSON", "/v2/repository/models/spare/load", b'{"parameters":{"config":"{"}}'),
    (
        "load: config of the client", "/v2/repository/models/spare/load",
        json.dumps({"parameters": {"config": json.dumps({"backend": "python"})}}).encode(),
    ),
    (
        "load: file without config", "/v2/repository/models/spare/load",
        b'{"parameters":{"file:1/model.py":"cGFzcw=="}}',
    ),
    ("load: no name", "/v2/repository/models//load", b"{}"),
    ("load: other verb in the path", "/v2/repository/models/spare/reload", b"{}"),
    ("load: of a version", "/v2/repository/models/spare/versions/1/load", b"{}"),
    ("unload: unknown model", "/v2/repository/models/nosuch/unload", b"{}"),
    ("unload: no JSON", "/v2/repository/models/nosuch/unload", b"please"),
    ("unload: parameters are a list", "/v2/repository/models/nosuch/unload", b'{"parameters":[1]}'),
    (
        "unload: unload_dependents is a text", "/v2/repository/models/nosuch/unload",
        b'{"parameters":{"unload_dependents":"yes"}}',
    ),
    ("shared memory: register what is not there", "/v2/systemsharedmemory/region/r/register",
     b'{"key":"/nosuch","offset":0,"byte_size":64}'),
    ("shared memory: register without a key", "/v2/systemsharedmemory/region/r/register",
     b'{"byte_size":64}'),
    ("shared memory: register, no JSON", "/v2/systemsharedmemory/region/r/register", b"x"),
    ("shared memory: register, no body", "/v2/systemsharedmemory/region/r/register", b""),
    ("shared memory: register, byte_size is a text", "/v2/systemsharedmemory/region/r/register",
     b'{"key":"/k","offset":0,"byte_size":"64"}'),
    ("shared memory: unregister an unknown region", "/v2/systemsharedmemory/region/r/unregister", b""),
    ("shared memory: unregister all", "/v2/systemsharedmemory/unregister", b""),
    ("CUDA shared memory: register", "/v2/cudasharedmemory/region/r/register",
     b'{"raw_handle":{"b64":"AAAA"},"device_id":0,"byte_size":64}'),
    ("CUDA shared memory: unregister all", "/v2/cudasharedmemory/unregister", b""),
    ("trace: unchanged", "/v2/trace/setting", b"{}"),
    ("trace: no body", "/v2/trace/setting", b""),
    ("trace: level OFF", "/v2/trace/setting", b'{"trace_level":["OFF"]}'),
    ("trace: level TIMESTAMPS", "/v2/models/idle/trace/setting", b'{"trace_level":["TIMESTAMPS"]}'),
    ("trace: unknown level", "/v2/trace/setting", b'{"trace_level":["LOUD"]}'),
    ("trace: unknown setting", "/v2/trace/setting", b'{"nope":"1"}'),
    ("trace: no JSON", "/v2/trace/setting", b"x"),
    ("trace: of an unknown model", "/v2/models/nosuch/trace/setting", b'{"trace_level":["OFF"]}'),
    ("log: unchanged", "/v2/logging", b"{}"),
    ("log: unknown setting", "/v2/logging", b'{"nope":true}'),
    ("log: verbose level is a text", "/v2/logging", b'{"log_verbose_level":"1"}'),
    ("log: no JSON", "/v2/logging", b"x"),
    ("log: verbose level 0", "/v2/logging", b'{"log_verbose_level":0}'),
    ("generate", "/v2/models/ident/generate", b'{"X":[1.0]}'),
    ("generate_stream", "/v2/models/ident/generate_stream", b'{"X":[1.0]}'),
    ("generate: unknown model", "/v2/models/nosuch/generate", b'{"X":[1.0]}'),
)  # fmt: skip

VERSION = frozenset({"version"})
UNSETTLED = frozenset({"reason", "spare"})
"""Words, and the model that is loaded and unloaded all the time."""


def _infer(model: str, body: bytes) -> Http:
    return Http(name="", method="POST", path=f"/v2/models/{model}/infer", body=body)


def _control(model: str, verb: str) -> Http:
    return Http(name="", method="POST", path=f"/v2/repository/models/{model}/{verb}", body=b"{}")


def control() -> Iterator[Http]:
    """All of them."""
    for line in PATHS:
        method, path = line.split()
        mask = VERSION if path == "/v2" else frozenset()
        yield Http(name=line, method=method, path=path, mask=mask)
    load, unload = _control("spare", "load"), _control("spare", "unload")
    for name, path, body in POSTS:
        yield Http(name=name, method="POST", path=path, body=body, mask=UNSETTLED)
    for path in (
        "/v2/models/gone",
        "/v2/models/gone/ready",
        "/v2/models/gone/config",
        "/v2/models/gone/stats",
    ):
        yield Http(name=f"unloaded: GET {path}", path=path)
    yield Http(name="unloaded: infer", method="POST", path="/v2/models/gone/infer", body=COUNTED)
    yield Http(name="unloaded: unload", method="POST", path="/v2/repository/models/gone/unload")
    yield Http(name="unload", method="POST", path="/v2/repository/models/spare/unload", first=(load,))
    yield Http(name="unload: and load", method="POST", path="/v2/models/spare/infer", body=COUNTED,
               first=(unload, load))  # fmt: skip
    yield Http(
        name="stats: three good requests and two wrong ones",
        path="/v2/models/counted/stats",
        first=(*(_infer("counted", COUNTED),) * 3, *(_infer("counted", WRONG),) * 2),
        settles=True,
    )
    yield Http(name="stats: of all models", path="/v2/models/stats", mask=frozenset({"count", "model_stats"}))
