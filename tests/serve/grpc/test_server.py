"""The gRPC server alone, with methods defined here, called by the stock client in another thread."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import uvloop
from grpc._cython import cygrpc

from clockwork_serve.serve.grpc import core
from clockwork_serve.serve.grpc.arrivals import Receipts
from clockwork_serve.serve.grpc.call import Aborted, GrpcCall
from clockwork_serve.serve.grpc.core import Unexpected, check_grpcio
from clockwork_serve.serve.grpc.server import GrpcServer, callback, coroutine, stream
from clockwork_serve.units import ms
from qa.hostile.frames import grpc_paths_that_are_no_text
from qa.hostile.traffic import attack
from tests.serve.gateway.running import until
from tests.timing import Timing

LARGEST = 100_000
LONG = "a\r\n\ud800" + "€😀" * 10_000
Code = grpc.StatusCode


def parse(message: bytes) -> bytes:
    if message == b"garbage":
        raise ValueError(message)
    return message


class Served:
    """A server on a loop in its own thread; ``held`` are the calls of /t/hold that are not answered."""

    def __init__(self) -> None:
        self.held: list[GrpcCall] = []
        self.cancelled: list[GrpcCall] = []
        self.began: list[str] = []
        self.arrival_ns = 0  # of the call that was told of last
        self.ended: list[str] = []
        self.broken: list[Any] = []
        self.loop = uvloop.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: self.broken.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.port = self.run(self._start())
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")

    async def _start(self) -> int:
        self.server = GrpcServer(
            [
                callback("/t/hold", parse, self._hold),
                callback("/t/twice", parse, self._twice),
                callback("/t/raise", parse, self._raise),
                callback("/t/tell", parse, self._tell),
                callback("/t/unless", parse, self._unless),
                coroutine("/t/double", parse, bytes, self._double),
                coroutine("/t/sleep", parse, bytes, self._sleep),
                stream("/t/echo", parse, bytes, self._echo),
                stream("/t/ages", parse, bytes, self._ages),
            ],
            [("grpc.max_receive_message_length", LARGEST), ("grpc.so_reuseport", 0)],
            self._gate,
        )
        return await self.server.listen("127.0.0.1:0")

    def _gate(self, path: str, metadata: Any) -> str:
        given = dict(metadata)
        if "stumble" in given:
            raise KeyError(path)
        if "nap" in given:
            time.sleep(2.0)
        if given.get("name") == "long":
            raise Aborted(Code.UNAUTHENTICATED, LONG)
        if given.get("name") == "nobody":
            raise Aborted(Code.UNAUTHENTICATED, "go away", (("why", "nobody"),))
        return str(given.get("name", ""))

    def _hold(self, call: GrpcCall, request: bytes) -> None:
        call.on_cancel = lambda: self.cancelled.append(call)
        self.held.append(call)

    def _twice(self, call: GrpcCall, request: bytes) -> None:
        call.reply(request, (("answer", "first"),))
        call.reply(b"again")
        call.fail(Code.INTERNAL, "and again")

    def _raise(self, call: GrpcCall, request: bytes) -> None:
        raise KeyError("a secret")

    def _unless(self, call: GrpcCall, request: bytes) -> None:
        failure = None if request == b"in time" else (Code.DEADLINE_EXCEEDED, "late", (("why", "slow"),))
        delivery = SimpleNamespace(failure=lambda: failure, on_sent=lambda: self.began.append("sent"))
        call.reply_unless(delivery, b"good", (("answer", "first"),))

    def _tell(self, call: GrpcCall, request: bytes) -> None:
        age_ns = time.monotonic_ns() - call.arrival_ns
        assert 0 <= age_ns < 60 * 10**9
        self.arrival_ns = call.arrival_ns
        call.reply(f"{call.identity} {call.peer()} {call.metadatum('k')} {call.time_remaining()}".encode())

    async def _double(self, request: bytes, call: GrpcCall) -> bytes:
        await asyncio.sleep(0)
        if request == b"raise":
            raise KeyError("a secret")
        if request == b"abort":
            raise Aborted(Code.ABORTED, "as you wish", (("why", "you"),))
        if request == b"long":
            raise Aborted(Code.ABORTED, LONG)
        return request * 2

    async def _sleep(self, request: bytes, call: GrpcCall) -> bytes:
        self.began.append("sleep")
        try:
            await asyncio.sleep(1000)
        finally:
            self.ended.append("sleep")
        return b""

    async def _echo(self, requests: AsyncIterator[bytes], call: GrpcCall) -> AsyncIterator[bytes]:
        try:
            yield b"begin"
            async for request in requests:
                if request == b"raise":
                    raise KeyError("a secret")
                if request == b"end":
                    return
                yield request
        finally:
            self.ended.append("echo")

    async def _ages(self, requests: AsyncIterator[bytes], call: GrpcCall) -> AsyncIterator[bytes]:
        async for _ in requests:
            await asyncio.sleep(0.1)  # it is busy with this one while the next ones come
            yield str(time.monotonic_ns() - call.arrival_ns).encode()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def do(self, function: Callable[[], Any]) -> Any:
        async def body() -> Any:
            return function()

        return self.run(body())

    def answer_all(self) -> None:
        def answer() -> None:
            held, self.held = self.held, []
            for call in held:
                call.reply(b"late")

        self.do(answer)

    def ask(self, method: str, message: bytes = b"x", **more: Any) -> bytes:
        return self.channel.unary_unary(f"/t/{method}")(message, timeout=20, **more)

    def begin(self, method: str, message: bytes = b"x", **more: Any) -> Any:
        return self.channel.unary_unary(f"/t/{method}").future(message, **more)

    def close(self, grace_s: float = 0.1) -> None:
        self.run(self.server.close(grace_s))
        self.channel.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(60)
        self.loop.close()


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    yield found
    found.close()
    assert found.broken == []


def refused(asked: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        asked()
    return caught.value


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.slow
def test_thousands_of_waiting_calls_take_no_thread(served: Served) -> None:
    waiting = [served.begin("hold") for _ in range(50)]
    until(lambda: len(served.held) == 50)
    before = threads()
    waiting += [served.begin("hold") for _ in range(2950)]
    until(lambda: len(served.held) == 3000)
    assert threads() <= before + 2
    # All of them in one turn of the loop.
    served.answer_all()
    assert {call.result(60) for call in waiting} == {b"late"}
    assert served.cancelled == []


def test_a_call_knows_its_metadata(served: Served) -> None:
    identity, peer, value, remaining = served.ask("tell", metadata=(("k", "v"), ("name", "me"))).split()
    assert (identity, peer.partition(b":")[0], value) == (b"me", b"ipv4", b"v")
    # gRPC sends it rounded up.
    assert 15 < float(remaining) < 21
    assert served.channel.unary_unary("/t/tell")(b"x").endswith(b" None None")


def test_a_call_ends_once(served: Served) -> None:
    response, call = served.channel.unary_unary("/t/twice").with_call(b"x", timeout=20)
    assert (response, call.trailing_metadata()) == (b"x", (("answer", "first"),))


def test_a_cancelled_call_is_noticed(served: Served) -> None:
    call = served.begin("hold")
    until(lambda: served.held)
    assert served.cancelled == []
    call.cancel()
    until(lambda: served.cancelled == served.held)
    # A late message is not parsed, and replies are ignored.
    served.do(lambda: served.held[0].handle_message(b"x"))
    assert len(served.held) == 1
    served.answer_all()
    assert served.ask("double") == b"xx"


def until_one_expires_there(served: Served, method: str, begun: list[Any]) -> None:
    """Ask until a deadline passes of a call that the server began: on a busy machine short ones do before."""
    timeout_s = 0.2
    while not begun:
        call = served.begin(method, timeout=timeout_s)
        assert refused(call.result).code() is Code.DEADLINE_EXCEEDED
        timeout_s *= 2


def test_a_deadline_that_passes_is_noticed(served: Served) -> None:
    until_one_expires_there(served, "hold", served.held)
    until(lambda: len(served.cancelled) == len(served.held))


def test_a_coroutine_is_cancelled_with_its_call(served: Served) -> None:
    until_one_expires_there(served, "sleep", served.began)
    until(lambda: served.ended == served.began)


def test_an_idle_transport_has_no_gaps(served: Served, timing: Timing) -> None:
    for _ in range(3):
        time.sleep(0.5)  # in which its thread comes round less and less often
        sent_ns = time.monotonic_ns()
        served.ask("tell")
        with timing.judged():
            assert served.arrival_ns > sent_ns - ms(30)


def test_a_message_is_as_old_as_the_kernel_says_of_its_client_s_connection(
    served: Served, monkeypatch: pytest.MonkeyPatch, timing: Timing
) -> None:
    ask, ages_ns = Receipts.age_ns, []

    def late(receipts: Receipts, peer: str) -> int:
        time.sleep(0.1)  # gRPC's core has read it, and its threads wait for a core
        ages_ns.append(ask(receipts, peer))
        return ms(500)

    monkeypatch.setattr(Receipts, "age_ns", late)
    served.ask("tell")
    told_ns = time.monotonic_ns()
    assert served.arrival_ns <= told_ns - ms(500)
    with timing.judged():
        assert ages_ns[-1] > ms(50), "the kernel knows the address that gRPC gives"


def test_too_large_a_message_is_rejected(served: Served) -> None:
    assert refused(lambda: served.ask("double", bytes(LARGEST + 1))).code() is Code.RESOURCE_EXHAUSTED
    assert served.ask("double", bytes(LARGEST)) == bytes(2 * LARGEST)
    assert served.held == []


def test_a_compressed_message_is_read_and_its_limit_is_that_of_its_content(served: Served) -> None:
    assert served.ask("double", bytes(1000), compression=grpc.Compression.Gzip) == bytes(2000)
    bomb = lambda: served.ask("double", bytes(LARGEST + 1), compression=grpc.Compression.Gzip)  # noqa: E731
    assert refused(bomb).code() is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("asked", [("raise", b"x"), ("double", b"raise")])
def test_an_exception_of_a_method_is_logged_and_hidden_from_the_client(
    served: Served, caplog: pytest.LogCaptureFixture, asked: tuple[str, bytes]
) -> None:
    error = refused(lambda: served.ask(*asked))
    assert error.code() is Code.INTERNAL
    assert "secret" not in error.details()
    assert "a secret" in caplog.text
    assert served.ask("double") == b"xx"


def test_an_exception_of_the_access_check_denies_access(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    error = refused(lambda: served.ask("double", metadata=(("stumble", "1"),)))
    assert (error.code(), "KeyError" in caplog.text) == (Code.INTERNAL, True)
    assert served.ask("double") == b"xx"


def test_access_is_denied_before_a_message_is_read(served: Served) -> None:
    error = refused(lambda: served.ask("hold", metadata=(("name", "nobody"),)))
    assert (error.code(), error.details()) == (Code.UNAUTHENTICATED, "go away")
    assert error.trailing_metadata() == (("why", "nobody"),)
    endless = served.channel.stream_stream("/t/echo")(
        iter(lambda: b"x", None), metadata=(("name", "nobody"),)
    )
    assert refused(lambda: next(endless)).code() is Code.UNAUTHENTICATED
    assert (served.held, served.ended) == ([], [])


def test_a_method_may_choose_its_error(served: Served) -> None:
    error = refused(lambda: served.ask("double", b"abort"))
    assert (error.code(), error.details()) == (Code.ABORTED, "as you wish")
    assert error.trailing_metadata() == (("why", "you"),)


def test_the_text_of_an_error_may_be_anything(served: Served) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.ask("double", b"long")
    assert (caught.value.code(), caught.value.details()[:14]) == (Code.ABORTED, "a\r\n\\ud800€😀€😀€")
    with pytest.raises(grpc.RpcError) as caught:
        served.ask("double", b"x", metadata=(("name", "long"),))
    assert caught.value.code() is Code.UNAUTHENTICATED
    assert 500 < len(caught.value.details()) < 2000


def test_an_unknown_method_is_unimplemented(served: Served) -> None:
    error = refused(lambda: served.ask("nothing"))
    assert (error.code(), "/t/nothing" in error.details()) == (Code.UNIMPLEMENTED, True)


def test_an_invalid_message_is_an_error(served: Served) -> None:
    error = refused(lambda: served.ask("double", b"garbage"))
    assert (error.code(), "/t/double" in error.details()) == (Code.INVALID_ARGUMENT, True)
    assert refused(lambda: list(served.channel.stream_stream("/t/echo")(iter([b"garbage"])))).code() is (
        Code.INVALID_ARGUMENT
    )


def test_a_call_without_its_message_is_an_error(served: Served) -> None:
    call = served.channel.stream_unary("/t/double")
    assert refused(lambda: call(iter([]), timeout=60)).code() is Code.UNIMPLEMENTED


def test_a_stream_goes_both_ways_while_it_is_open(served: Served) -> None:
    asked = ["1", "2", "3"]
    gone = threading.Semaphore(0)

    def requests() -> Iterator[bytes]:
        for each in asked:
            gone.acquire()
            yield each.encode()

    found = []
    for response in served.channel.stream_stream("/t/echo")(requests(), timeout=60):
        found.append(response)
        gone.release()
    assert found == [b"begin", b"1", b"2", b"3"]
    assert served.ended == ["echo"]


def test_a_stream_may_be_long_and_its_server_may_end_it(served: Served) -> None:
    sent = [bytes([number % 251]) * 1000 for number in range(2000)]
    found = list(served.channel.stream_stream("/t/echo")(iter([*sent, b"end"]), timeout=60))
    assert found == [b"begin", *sent]


def test_messages_of_a_stream_are_dated_while_its_method_is_busy(served: Served) -> None:
    ages = served.channel.stream_stream("/t/ages")(iter([b"x"] * 8), timeout=60)
    ages_ns = [int(age) for age in ages]
    assert ages_ns[-1] > ms(600), "it came with the others, before seven times 100 ms"


def test_a_stream_is_read_beyond_what_is_read_ahead(served: Served) -> None:
    sent = [bytes([number]) * 90_000 for number in range(40)]
    held = threading.Event()

    def requests() -> Iterator[bytes]:
        yield from sent
        held.set()

    responses = served.channel.stream_stream("/t/echo")(requests(), timeout=60)
    assert next(responses) == b"begin"
    held.wait(0.2)  # all that fits on the way is on the way before the first is read
    assert list(responses) == sent


def test_a_stream_that_raises_ends_as_internal(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    responses = served.channel.stream_stream("/t/echo")(iter([b"1", b"raise"]), timeout=60)
    assert (next(responses), next(responses)) == (b"begin", b"1")
    error = refused(lambda: next(responses))
    assert (error.code(), "secret" in error.details()) == (Code.INTERNAL, False)
    assert "a secret" in caplog.text


def test_a_cancelled_stream_runs_its_finally_blocks(served: Served) -> None:
    nothing = threading.Event()
    responses = served.channel.stream_stream("/t/echo")(iter(lambda: b"x" if nothing.wait(20) else b"", b""))
    assert next(responses) == b"begin"
    responses.cancel()
    until(lambda: served.ended == ["echo"])
    nothing.set()


def test_stopping_lets_open_calls_complete(served: Served) -> None:
    call = served.begin("hold")
    until(lambda: served.held)
    stopping = asyncio.run_coroutine_threadsafe(served.server.close(20), served.loop)
    time.sleep(0.05)
    assert not stopping.done()
    served.answer_all()
    assert call.result(60) == b"late"
    stopping.result(60)
    assert not [thread for thread in threading.enumerate() if thread.name == "grpc"]
    error = refused(lambda: served.begin("double", timeout=0.5).result())
    assert error.code() in {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED}


def test_stopping_cancels_calls_after_the_grace_period(served: Served) -> None:
    calls = [served.begin("hold") for _ in range(20)] + [served.begin("sleep")]
    responses = served.channel.stream_stream("/t/echo")(iter([]), timeout=60)
    list(responses)
    until(lambda: len(served.held) == 20 and served.began)
    served.run(served.server.close(0.1))
    assert {refused(call.result).code() for call in calls} <= {Code.CANCELLED, Code.UNAVAILABLE}
    until(lambda: len(served.cancelled) == 20 and "sleep" in served.ended)
    served.run(served.server.close(0.1))


def test_calls_cancelled_in_the_last_round_of_events_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Delayed(core.CoreTransport):
        def _handle_event(self, event: Any) -> None:
            super()._handle_event(event)
            if event.tag[0] == "down":
                time.sleep(0.5)  # meanwhile the loop ends the queue, so this round sees its end too

    monkeypatch.setattr(core, "CoreTransport", Delayed)
    found = Served()
    calls = [found.begin("hold") for _ in range(20)]
    until(lambda: len(found.held) == 20)
    found.close()
    assert {refused(call.result).code() for call in calls} <= {Code.CANCELLED, Code.UNAVAILABLE}
    assert len(found.cancelled) == 20


def test_replies_after_the_end_are_ignored(served: Served) -> None:
    call = served.begin("hold")
    until(lambda: served.held)
    served.run(served.server.close(0))
    refused(call.result)
    # As if its end had not been noticed. The core would abort the process if it were used now.
    served.held[0].is_open = True
    served.answer_all()


def test_a_port_in_use_is_an_error_and_leaves_no_thread(served: Served) -> None:
    async def second() -> None:
        await GrpcServer([], [("grpc.so_reuseport", 0)]).listen(f"127.0.0.1:{served.port}")

    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(OSError, match=str(served.port)):
        served.run(second())
    assert {thread.name for thread in threading.enumerate()} == before


UNCLOSED = """
import asyncio
from clockwork_serve.serve.grpc.server import GrpcServer, callback

async def main():
    server = GrpcServer([callback("/t/hold", bytes, lambda call, request: held.append(call))], [])
    print(await server.listen("127.0.0.1:0"), flush=True)
    while not held:
        await asyncio.sleep(0.01)

held = []
asyncio.run(main())
print("ends")
"""


def test_a_process_that_never_closed_the_server_exits() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", UNCLOSED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        with grpc.insecure_channel(f"127.0.0.1:{int(process.stdout.readline())}") as channel:
            call = channel.unary_unary("/t/hold").future(b"x")
            told, errors = process.communicate(timeout=60)
            # gRPC's core itself may say that the connection ends under a call.
            ours = [line for line in errors.splitlines() if not re.match(r"[IWE]\d{4} .*GOAWAY", line)]
            assert (process.returncode, told, ours) == (0, "ends\n", [])
            assert refused(call.result).code() in {Code.CANCELLED, Code.UNAVAILABLE}


def test_a_grpcio_without_what_is_needed_is_named() -> None:
    asyncio.run(check_grpcio())
    there = {name: getattr(cygrpc, name) for name in vars(cygrpc)}
    less = SimpleNamespace(**{**there, "CompletionQueue": object, "SendMessageOperation": None})
    del less.SendMessageOperation
    with pytest.raises(Unexpected, match=r"without CompletionQueue.poll, .*SendMessageOperation$"):
        asyncio.run(check_grpcio(less))


def test_a_delivery_is_checked_when_the_core_gets_the_reply(served: Served) -> None:
    answer, call = served.channel.unary_unary("/t/unless").with_call(b"in time", timeout=60)
    assert (answer, dict(call.trailing_metadata())["answer"]) == (b"good", "first")
    until(lambda: served.began == ["sent"])
    with pytest.raises(grpc.RpcError) as caught:
        served.ask("unless", b"too late")
    assert (caught.value.code(), caught.value.details()) == (Code.DEADLINE_EXCEEDED, "late")
    assert dict(caught.value.trailing_metadata())["why"] == "slow"
    assert served.began == ["sent"]


def test_a_path_that_is_not_utf_8_ends_no_server(served: Served) -> None:
    waits = served.begin("hold")
    until(lambda: served.held)
    for number in range(3):
        attack(served.port, grpc_paths_that_are_no_text(random.Random(number)))
        assert served.ask("double") == b"xx"
    served.answer_all()
    assert waits.result(60) == b"late", "open calls go on"


@pytest.mark.slow
def test_thousands_of_calls_are_accepted_after_a_gap_of_what_accepts_them(served: Served) -> None:
    served.ask("double")
    calls = [served.begin("double", metadata=(("nap", ""),))]
    calls += [served.begin("double") for _ in range(3000)]
    assert {call.result(60) for call in calls} == {b"xx"}
