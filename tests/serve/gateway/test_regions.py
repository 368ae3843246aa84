"""Regions in real shared memory: what is opened and what is not; clients that shrink objects any time."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import (
    Forbidden,
    InferCall,
    InputTensor,
    OutputTensor,
    OutputWish,
    RegionExists,
    SharedRef,
    SharedRegion,
    TooLarge,
    UnknownRegion,
    Unsupported,
)
from clockwork_serve.serve.gateway import client_shm as gateway_regions
from clockwork_serve.serve.gateway.client_shm import Regions, allowed, is_loopback
from clockwork_serve.serve.gateway.requests import Slots
from clockwork_serve.units import MIB
from tests.oip.models import identity, served, spec
from tests.serve.segments import PREFIX, Segment, segment


@pytest.fixture
def regions(tmp_path: Path) -> Regions:
    return Regions(PREFIX, tmp_path / "regions")


@pytest.fixture
def slots() -> Iterator[Slots]:
    found = Slots(MIB)
    yield found
    assert found.used_bytes == 0
    found.region.check()
    found.close()


@pytest.fixture
def shared() -> Iterator[Segment]:
    with segment(4096, bytes(range(256)) * 16) as found:
        yield found


def region(of: Segment, name: str = "r", offset: int = 0, byte_size: int = 4096) -> SharedRegion:
    return SharedRegion(name, of.key, offset, byte_size)


def reading(*refs: SharedRef) -> InferCall:
    return InferCall(
        [InputTensor(f"X{at}", "UINT8", (1,), b"", ref) for at, ref in enumerate(refs)], shared=True
    )


def writing(ref: SharedRef, name: str = "Y") -> InferCall:
    return InferCall([], [OutputWish(name, binary=True, shared=ref)], shared=True)


def read(regions: Regions, slots: Slots, *refs: SharedRef) -> list[bytes]:
    call = reading(*refs)
    body = regions.read_inputs(call, slots, None)
    found = [bytes(tensor.data) for tensor in call.inputs]
    if body is not None:
        slots.drop(body)
    return found


def test_regions_are_registered_until_they_are_unregistered(regions: Regions, shared: Segment) -> None:
    one, two = region(shared, "b"), region(shared, "a/ü\0", 16, 32)
    regions.register(one)
    regions.register(two)

    assert regions.registered() == [two, one]
    assert regions.registered("b") == [one]
    with pytest.raises(RegionExists, match="'b' already in manager"):
        regions.register(region(shared, "b", 8, 8))
    regions.unregister("b")
    regions.unregister("b")
    with pytest.raises(UnknownRegion, match="Unable to find system shared memory region: 'b'"):
        regions.registered("b")
    regions.unregister()
    assert regions.registered() == []


def test_every_gateway_of_a_server_knows_the_same(tmp_path: Path, slots: Slots, shared: Segment) -> None:
    one, other = Regions(PREFIX, tmp_path / "regions"), Regions(PREFIX, tmp_path / "regions")
    one.register(region(shared))

    assert read(other, slots, SharedRef("r", 1, 2)) == [b"\1\2"]
    with pytest.raises(RegionExists):
        other.register(region(shared))
    other.unregister("r")
    with pytest.raises(UnknownRegion, match="Unable to find shared memory region: 'r'"):
        read(one, slots, SharedRef("r", 1, 2))


def test_there_is_a_limit_of_regions(regions: Regions, shared: Segment, tmp_path: Path) -> None:
    for number in range(gateway_regions.REGIONS_MAX):
        (tmp_path / "regions" / str(number)).symlink_to("x")
    with pytest.raises(TooLarge, match="expected at most 4096 regions"):
        regions.register(region(shared))


@pytest.mark.parametrize(("offset", "byte_size"), [(0, 4097), (4096, 1), (1, 4096), (1 << 62, 1 << 62)])
def test_a_region_must_fit_into_its_object(
    regions: Regions, shared: Segment, offset: int, byte_size: int
) -> None:
    with pytest.raises(
        InvalidRequest, match=r"'r': invalid args: expected at least .* bytes in .*, found 4096"
    ):
        regions.register(region(shared, "r", offset, byte_size))
    assert regions.registered() == []


def test_a_missing_object_is_rejected(regions: Regions) -> None:
    with pytest.raises(InvalidRequest, match=r"Unable to open shared memory region: .*No such file"):
        regions.register(SharedRegion("r", f"{PREFIX}{uuid.uuid4().hex}", 0, 1))


def test_only_plain_objects_of_one_name_are_opened(regions: Regions, shared: Segment, tmp_path: Path) -> None:
    aside = Path(f"/dev/shm{PREFIX}{uuid.uuid4().hex}")
    key = f"/{aside.name}"
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4096))
    for make, words in (
        (lambda: aside.symlink_to(secret), "Too many levels of symbolic links"),
        (lambda: aside.symlink_to(shared.path), "Too many levels of symbolic links"),
        (lambda: aside.hardlink_to(shared.path), "2 names"),
        (lambda: os.mkfifo(aside), "found p"),
        (aside.mkdir, "found d"),
    ):
        make()
        try:
            with pytest.raises(
                InvalidRequest, match=f"Unable to open shared memory region: '{key}'.*{words}"
            ):
                regions.register(SharedRegion("r", key, 0, 1))
        finally:
            aside.rmdir() if aside.is_dir() and not aside.is_symlink() else aside.unlink()


def test_objects_of_another_user_are_refused(tmp_path: Path, shared: Segment) -> None:
    regions = Regions(PREFIX, tmp_path / "regions", owner=os.geteuid() + 1)
    with pytest.raises(Forbidden, match=f"of the server's user .* of user {os.geteuid()}"):
        regions.register(region(shared))


def test_keys_without_the_prefix_are_refused(tmp_path: Path, shared: Segment) -> None:
    with pytest.raises(Forbidden, match="begins with '/mine-'"):
        Regions("/mine-", tmp_path / "regions").register(region(shared))


def test_a_lease_on_the_object_does_not_block(regions: Regions, slots: Slots, shared: Segment) -> None:
    regions.register(region(shared))
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel asks the holder to let go
    try:
        fcntl.fcntl(shared.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        started_s = time.monotonic()
        with pytest.raises(InvalidRequest, match="Resource temporarily unavailable"):
            read(regions, slots, SharedRef("r", 0, 1))
        assert time.monotonic() - started_s < 10  # the kernel would wait for 45
        fcntl.fcntl(shared.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        signal.signal(signal.SIGIO, before)
    assert read(regions, slots, SharedRef("r", 0, 1)) == [b"\0"]


def test_tensors_are_read_into_the_slots_region(regions: Regions, slots: Slots, shared: Segment) -> None:
    regions.register(region(shared, "r", 256, 1024))
    call = reading(SharedRef("r", 0, 64), SharedRef("r", 100, 64))
    body = regions.read_inputs(call, slots, None)

    assert body is not None
    slot = slots.fill(call.inputs, 8, body)
    assert slot is not None
    memory = slots.region.buffer
    assert [bytes(memory[ref.offset : ref.offset + ref.nbytes]) for ref in slot.tensors.refs] == [
        bytes(range(64)), bytes(range(100, 164)),
    ]  # fmt: skip
    assert slot.tensors.refs[0].offset == body.start  # not copied again
    slots.free(slot)


def test_shared_tensors_can_be_mixed_with_sent_ones(regions: Regions, slots: Slots, shared: Segment) -> None:
    regions.register(region(shared))
    call = reading(SharedRef("r", 7, 3))
    call.inputs.append(InputTensor("Z", "UINT8", (2,), b"ab"))

    assert regions.read_inputs(call, slots, None) is None
    assert [bytes(tensor.data) for tensor in call.inputs] == [b"\7\x08\x09", b"ab"]


def test_more_than_the_server_can_hold_is_not_read(regions: Regions, slots: Slots) -> None:
    with segment(2 * MIB) as large:
        regions.register(region(large, byte_size=2 * MIB))
        with pytest.raises(TooLarge, match=f"expected at most {MIB} bytes, found {MIB + 1}"):
            read(regions, slots, SharedRef("r", 0, MIB), SharedRef("r", 0, 1))
        # More than half of the region is for bodies that are copied.
        assert read(regions, slots, SharedRef("r", 0, MIB)) == [bytes(MIB)]


def test_an_object_truncated_since_is_an_error(regions: Regions, slots: Slots, shared: Segment) -> None:
    regions.register(region(shared))
    shared.resize(100)

    assert read(regions, slots, SharedRef("r", 99, 1)) == [bytes([99])]
    with pytest.raises(InvalidRequest, match=r"expected at least 101 bytes .* found 100"):
        read(regions, slots, SharedRef("r", 99, 2))
    with pytest.raises(InvalidRequest, match=r"expected at least 108 bytes .* found 100"):
        regions.check_outputs(writing(SharedRef("r", 100, 8)), identity(), 1)
    with pytest.raises(InvalidRequest, match=r"expected at least 108 bytes .* found 100"):
        regions.write_outputs(writing(SharedRef("r", 100, 8)), [OutputTensor("Y", "FP32", (1, 2), bytes(8))])
    shared.resize(4096)
    assert read(regions, slots, SharedRef("r", 100, 2)) == [b"\0\0"]


def test_an_unlinked_object_is_an_error(regions: Regions, slots: Slots, shared: Segment) -> None:
    regions.register(region(shared))
    Path(shared.path).unlink()
    with pytest.raises(InvalidRequest, match=r"Unable to open shared memory region: .*No such file"):
        read(regions, slots, SharedRef("r", 0, 1))


def test_an_object_truncated_at_the_worst_moment_is_an_error(
    tmp_path: Path, slots: Slots, shared: Segment
) -> None:
    class Shrinking(Regions):
        """Between all checks and the copy, the client shrinks it."""

        @contextmanager
        def _reached(self, ref: SharedRef, how: int) -> Iterator[tuple[int, int]]:
            with super()._reached(ref, how) as found:
                shared.resize(10)
                yield found

    regions = Shrinking(PREFIX, tmp_path / "regions")
    regions.register(region(shared))
    with pytest.raises(InvalidRequest, match="'r' was truncated while it was read: 7 bytes are missing"):
        read(regions, slots, SharedRef("r", 9, 8))
    shared.resize(4096)
    regions.write_outputs(writing(SharedRef("r", 64, 8)), [OutputTensor("Y", "FP32", (1, 2), bytes(8))])


@pytest.mark.timeout(60)
def test_a_client_that_keeps_truncating_gets_errors_only(regions: Regions, slots: Slots) -> None:
    nbytes = 256 * 1024
    stop = threading.Event()
    with segment(nbytes, b"\1" * nbytes) as moving:
        regions.register(region(moving, byte_size=nbytes))
        ref = SharedRef("r", 0, nbytes)

        def shrink_and_grow() -> None:
            while not stop.is_set():
                moving.resize(0)
                moving.resize(nbytes)

        mover = threading.Thread(target=shrink_and_grow)
        mover.start()
        came: dict[str, int] = {"read": 0, "written": 0, "refused": 0}
        try:
            for _ in range(2000):
                try:
                    assert len(read(regions, slots, ref)[0]) == nbytes
                    came["read"] += 1
                    regions.write_outputs(
                        writing(ref), [OutputTensor("Y", "UINT8", (nbytes,), b"\2" * nbytes)]
                    )
                    came["written"] += 1
                except InvalidRequest as error:
                    assert "truncated while" in str(error) or "expected at least" in str(error)  # noqa: PT017
                    came["refused"] += 1
        finally:
            stop.set()
            mover.join()
    assert came["refused"] > 0
    assert came["read"] > 0


def test_an_output_of_known_size_must_fit(regions: Regions, shared: Segment) -> None:
    regions.register(region(shared, byte_size=64))
    fits, short = SharedRef("r", 0, 16), SharedRef("r", 0, 15)
    regions.check_outputs(writing(fits), identity("FP32", 2), 2)
    with pytest.raises(InvalidRequest, match=r"for output 'Y' \(15 bytes\) should be at least 16 bytes"):
        regions.check_outputs(writing(short), identity("FP32", 2), 2)
    with pytest.raises(InvalidRequest, match=r"Invalid offset \+ byte size"):
        regions.check_outputs(writing(SharedRef("r", 60, 16)), identity("FP32", 2), 2)
    with pytest.raises(UnknownRegion):
        regions.check_outputs(writing(SharedRef("s", 0, 16)), identity("FP32", 2), 2)
    text = served((spec("X", "BYTES", 2),), (spec("Y", "BYTES", 2),))
    regions.check_outputs(writing(short), text, 2)
    with pytest.raises(InvalidRequest, match=r"\(15 bytes\) should be at least 16 bytes"):
        regions.write_outputs(writing(short), [OutputTensor("Y", "BYTES", (1, 2), bytes(16))])


def test_outputs_are_written_into_their_regions_only(regions: Regions, shared: Segment) -> None:
    regions.register(region(shared, "r", 1024, 64))
    regions.write_outputs(writing(SharedRef("r", 8, 32)), [OutputTensor("Y", "UINT8", (4,), b"wxyz")])

    before = bytes(range(256)) * 16
    assert shared.read(4096) == before[:1032] + b"wxyz" + before[1036:]


def test_shared_memory_is_for_clients_of_this_host_where_it_is_on(regions: Regions) -> None:
    assert allowed(regions, local=True) is regions
    with pytest.raises(Forbidden, match="loopback"):
        allowed(regions, local=False)
    with pytest.raises(Unsupported, match="--shared-memory PREFIX"):
        allowed(None, local=True)


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False),
     ("192.168.1.1", False), ("fe80::1%eth0", False), ("::ffff:10.0.0.1", False), ("0.0.0.0", False),
     ("", False), ("localhost", False)],
)  # fmt: skip
def test_loopback_is_known_by_its_address(host: str, local: bool) -> None:
    assert is_loopback(host) is local
