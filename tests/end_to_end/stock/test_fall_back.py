"""Stock clients where ``grpc.aio`` carries their calls: most of ``test_inference`` over gRPC again."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from clockwork_serve.serve.grpc.server import FALL_BACK_VARIABLE
from harness.serving import Serving
from qa.hostile.frames import grpc_paths_that_are_no_text
from qa.hostile.traffic import attack
from tests.end_to_end.stock import test_inference
from tests.end_to_end.stock.conftest import Start, Stock, start_stock


@pytest.fixture(scope="module")
def fallen_back(stock_repository: Path, start: Start) -> Iterator[Serving]:
    """A server whose gateway was told not to drive grpcio's core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FALL_BACK_VARIABLE, "1")
        with start_stock(start, stock_repository) as serving:
            yield serving


@pytest.fixture(params=["grpc", "grpc.aio"])
def stock(request: pytest.FixtureRequest, fallen_back: Serving) -> Iterator[Stock]:
    """Both clients of gRPC, in place of the four that ask the usual server."""
    found = Stock(request.param, fallen_back)
    yield found
    found.close()


test_every_datatype_comes_back_as_it_went = test_inference.test_every_datatype_comes_back_as_it_went
test_ids_versions_and_durations_come_back = test_inference.test_ids_versions_and_durations_come_back
test_requests_may_be_compressed = test_inference.test_requests_may_be_compressed
test_priorities_and_limits_are_taken = test_inference.test_priorities_and_limits_are_taken
test_a_limit_that_cannot_be_met_is_an_early_no = test_inference.test_a_limit_that_cannot_be_met_is_an_early_no
test_a_client_that_stops_waiting_is_told_so = (
    test_inference.test_a_client_that_stops_waiting_is_told_so_by_its_library
)
test_sequences_are_refused = test_inference.test_sequences_are_refused
test_wrong_requests_are_told_what_is_wrong = test_inference.test_wrong_requests_are_told_what_is_wrong
test_one_stream_carries_answers_errors_and_the_final_flag = (
    test_inference.test_one_stream_carries_answers_errors_and_the_final_flag
)
test_the_same_with_coroutines = test_inference.test_the_same_with_coroutines


def test_a_call_whose_path_is_no_text_ends_no_gateway(stock: Stock, fallen_back: Serving) -> None:
    before = fallen_back.server.pid("gateway-0")
    assert fallen_back.server.grpc_port is not None
    attack(fallen_back.server.grpc_port, grpc_paths_that_are_no_text(random.Random(1)))
    end = time.monotonic() + 20
    while not answers(stock):
        assert time.monotonic() < end, "the port stays closed"
    assert fallen_back.server.pid("gateway-0") == before


def answers(stock: Stock) -> bool:
    """Whether the port is open; for a moment it is not."""
    try:
        return bool(stock("is_server_live"))
    except InferenceServerException:
        time.sleep(0.1)
        return False
