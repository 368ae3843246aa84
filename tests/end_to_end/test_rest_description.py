"""schemathesis asks a running server all that its description says, and much that it does not allow.

No status that is not documented, no 500, no body or header that does not fit, nothing malformed accepted. The
number of cases is said, per operation with `pytest -s`, and too few fail the test.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clockwork_serve.units import MIB
from harness import repositories
from harness.serving import Serving
from tests.end_to_end.conftest import call, example_models
from tests.serve.segments import PREFIX, segment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
    ),
]

EXAMPLES = 15
SEED = 20261125
LEAST_CASES = 1200
LEAST_EACH = 3
LEAST_ANSWERS = 5
"""Inferences answered 200; of all else that can be, one."""
NEVER_OK = ("generate", "cudasharedmemory/region/{region}/register", "region/{region}/status")
"""What is not supported, and what is there only by luck."""
CONFIG = """
# What is documented as not supported, not serving or too late is no error of the server.
[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", "501", "503", "504"]

# What fits the schema must also fit the model, or be shared memory that is there, which no schema here knows.
[[operations]]
include-path-regex = "(infer|region/.*/register)$"
checks.positive_data_acceptance.enabled = false

# A path holds text: what is no text to its client is text to the server, and as good a name of a region.
[[operations]]
include-path-regex = "region/"
checks.negative_data_rejection.enabled = false

# A load reads, compiles and measures.
[[operations]]
include-path-regex = "/load$"
generation.max-examples = 4
"""


BITS = {"name": "bits", "shape": [1, 2], "datatype": "FP32", "data": [0, 1]}
TWO = BITS | {"shape": [2, 2], "data": [[0, 1], [1, 1]]}
WISH = {"name": "probability"}
BODIES: tuple[dict[str, Any], ...] = (
    {"inputs": [BITS]},
    {"inputs": [TWO], "id": "7", "parameters": {"slo_ms": 1000, "priority": 1}},
    {"inputs": [BITS], "outputs": [WISH | {"parameters": {"binary_data": True}}]},
    {"inputs": [TWO], "outputs": [WISH | {"parameters": {"classification": 1}}]},
    {"inputs": [TWO], "parameters": {"binary_data_output": True}},
    {"inputs": [BITS], "parameters": {"slo_ms": 0.001}},
    {"inputs": [BITS | {"shape": [1, 3]}]},
    {"inputs": [BITS | {"datatype": "INT32"}]},
    {"inputs": [BITS], "outputs": [{"name": "nosuch"}]},
    {"inputs": [BITS], "parameters": {"sequence_id": 7}},
    {"inputs": [{**BITS, "data": [], "parameters": {"shared_memory_region": "nosuch"}}]},
)
"""Right ones and wrong ones, for the example model."""


def focused(document: dict[str, Any], key: str) -> dict[str, Any]:
    """The description, with names that the server knows: else nearly all that is made up would be 404."""
    for path, operations in document["paths"].items():
        model = "spare" if "repository" in path else "mlp"
        known = {"model": [model, "nosuch"], "version": ["1", "7"]}
        if path.endswith("/infer"):
            known |= {"model": [model], "version": ["1"]}
            body = operations["post"]["requestBody"]["content"]["application/json"]
            del body["example"]
            body["examples"] = {str(number): {"value": value} for number, value in enumerate(BODIES)}
        for parameter in operations.get("parameters", ()):
            if parameter["name"] in known:
                parameter["schema"] = {"enum": known[parameter["name"]]}
                parameter["example"] = known[parameter["name"]][0]
    schemas = document["components"]["schemas"]
    fields = schemas["InferRequest"]["properties"]["inputs"]["items"]["properties"]
    fields["name"] = {"enum": ["bits", "nosuch"]}
    fields["datatype"] = {"enum": ["FP32", "FP16", "INT64", "BYTES"]}
    fields["shape"] |= {"items": {"type": "integer", "minimum": 0, "maximum": 3}, "maxItems": 3}
    schemas["RegisterRequest"]["properties"] = {
        "key": {"enum": [key, f"{PREFIX}nosuch", "/other"]},
        "byte_size": {"enum": [64, 4096, 4097]},
        "offset": {"enum": [0, 64]},
    }
    return document


def counted(events: Path) -> tuple[Counter[str], Counter[tuple[str, int]]]:
    """Cases by operation, and answers by operation and status."""
    cases: Counter[str] = Counter()
    answers: Counter[tuple[str, int]] = Counter()
    for line in events.read_text(encoding="utf-8").splitlines():
        finished = json.loads(line).get("ScenarioFinished")
        if finished is not None:
            recorder = finished["recorder"]
            cases[recorder["label"]] += len(recorder.get("cases", ()))
            for interaction in recorder.get("interactions", {}).values():
                if interaction.get("response"):
                    answers[recorder["label"], interaction["response"]["status_code"]] += 1
    return cases, answers


def test_every_answer_is_one_that_the_description_has(
    tmp_path: Path, start: Callable[..., AbstractContextManager[Serving]], capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models"
    example_models(repository)
    repositories.one_matrix(repository, "spare", np.eye(4, dtype=np.float32))
    config, schema, events = (tmp_path / name for name in ("st.toml", "openapi.json", "events.ndjson"))
    config.write_text(CONFIG)
    with (
        start(repository, memory_bytes=16 * MIB, slo_ms=20_000, shared_memory=PREFIX) as server,
        segment(4096, b"") as shared,
    ):
        document = focused(call(server.http_url, "/v2/openapi.json").json, shared.key)
        schema.write_text(json.dumps(document))
        command = [
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", str(schema),
            "--url", server.http_url, "--seed", str(SEED), "--max-examples", str(EXAMPLES), "--no-color",
            "--phases", "examples,coverage,fuzzing", "--report", "ndjson",
            "--report-ndjson-path", str(events), "--warnings", "off",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=240)
        assert call(server.http_url, "/v2/health/ready").status == 200, "it serves as before"
    cases, answers = counted(events)
    table = "\n".join(f"{count:6} {label}" for label, count in sorted(cases.items()))
    with capsys.disabled():
        least, count = min(cases.values()), sum(cases.values())
        sys.stdout.write(f" [{count} cases for {len(cases)} operations, each at least {least}] ")
    sys.stdout.write(table)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    operations = {
        f"{method.upper()} {path}"
        for path, item in document["paths"].items() for method in item if method != "parameters"
    }  # fmt: skip
    assert set(cases) == operations
    assert sum(cases.values()) >= LEAST_CASES, table
    assert min(cases.values()) >= LEAST_EACH, table
    never = {label for label in operations if not answers[label, 200]}
    assert all(any(words in label for words in NEVER_OK) for label in never), never
    infers = [label for label in operations if label.endswith("/infer")]
    assert min(answers[label, 200] for label in infers) >= LEAST_ANSWERS, answers
    assert {200, 400, 403, 404, 405, 501} <= {status for _, status in answers}
