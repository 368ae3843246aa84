"""Compressed bodies, honest ones and bombs."""

from __future__ import annotations

import gzip
import random
import zlib

import numpy as np
import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import Coding, TooLarge, Unsupported, compress, decompress, wanted_coding
from clockwork_serve.oip.compression import BELIEVED_BYTES
from clockwork_serve.units import MIB

BODY = b"all the numbers" * 100


def raw_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        (" GZIP ", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
    ],
)
def test_both_encodings(encoding: str, packed: bytes) -> None:
    assert decompress(packed, encoding, len(BODY)) == BODY


def test_a_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    with pytest.raises(TooLarge, match="at most 1000 bytes"):
        decompress(bomb, "gzip", 1000)


@pytest.mark.parametrize(("body_bytes", "trusted"), [(BELIEVED_BYTES, True), (BELIEVED_BYTES + 1, False)])
def test_what_little_becomes_is_believed_up_to_a_size(body_bytes: int, trusted: bool) -> None:
    packed = zlib.compress(bytes(body_bytes))
    if trusted:
        assert len(decompress(packed, "deflate", 10 * BELIEVED_BYTES)) == body_bytes
    else:
        with pytest.raises(TooLarge, match=f"{len(packed)} bytes are too few for it: send it as it is"):
            decompress(packed, "deflate", 10 * BELIEVED_BYTES)


def test_what_becomes_less_than_a_hundred_times_as_large_may_be_large() -> None:
    body = random.Random(1).randbytes(BELIEVED_BYTES // 40) + bytes(BELIEVED_BYTES * 2)
    assert decompress(zlib.compress(body), "deflate", 10 * BELIEVED_BYTES) == body


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"no gzip", "expected a gzip body"),
        (gzip.compress(BODY, mtime=0)[:-9], "its end missing"),
        (b"", "its end missing"),
        (gzip.compress(BODY, mtime=0) + b"more", "4 bytes after its end"),
    ],
)
def test_broken_bodies_are_named(body: bytes, error: str) -> None:
    with pytest.raises(InvalidRequest, match=error):
        decompress(body, "gzip", 10_000)


def test_other_encodings_are_not_supported() -> None:
    with pytest.raises(Unsupported, match="expected gzip or deflate, found 'br'"):
        decompress(b"", "br", 10)


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_what_is_compressed_comes_back_as_it_was(name: str) -> None:
    packed = b"".join(compress([BODY[:7], memoryview(BODY)[7:], b""], Coding(name, must=False)))
    assert len(packed) < len(BODY) / 10
    assert decompress(packed, name, len(BODY)) == BODY
    assert (gzip.decompress if name == "gzip" else zlib.decompress)(packed) == BODY


def test_a_large_answer_is_compressed_in_pieces_that_nobody_joins() -> None:
    noise = np.random.default_rng(1).bytes(20 * MIB)
    packed = compress([memoryview(noise)], Coding("gzip", must=False))
    assert max(map(len, packed)) < 2 * MIB
    assert gzip.decompress(b"".join(packed)) == noise


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("GZip", "gzip"),
        ("x-gzip", "gzip"),
        (" gzip ; q=0.5 ", "gzip"),
        ("gzip;q=0.001", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("br;q=1.0, gzip;q=0.5", "gzip"),
        ("gzip, identity;q=0.5", "gzip"),
        ("gzip, *;q=0.5", "gzip"),
        # What a library sends with every request is no wish.
        ("gzip, deflate", ""),
        ("gzip, deflate, br, zstd", ""),
        ("*", ""),
        # Not wanted, or not to be had.
        ("", ""),
        (",,", ""),
        ("identity", ""),
        ("gzip;q=0", ""),
        ("gzip;q=0.000", ""),
        ("gzip, identity", ""),
        ("gzip;q=0.5, identity", ""),
        ("br", ""),
        # What cannot be read was not said.
        ("gzip;q=2.5", ""),
        ("gzip;q=-1", ""),
        ("gzip;level=9", ""),
        ("gzip;q=nan", ""),
    ],
)
def test_a_response_is_compressed_for_who_asks(said: str, name: str) -> None:
    assert wanted_coding(said) == (Coding(name, must=False) if name else None)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("gzip, identity;q=0", "gzip"),
        ("deflate;q=0.9, gzip;q=0.8, identity;q=0", "deflate"),
        ("gzip, deflate, *;q=0", "gzip"),
        ("*, identity;q=0", "gzip"),
        ("gzip;q=0, *, identity;q=0", "deflate"),
        ("br, identity;q=0", ""),
        ("*;q=0", ""),
    ],
)
def test_who_cannot_read_it_plain_gets_it_compressed_if_that_can_be(said: str, name: str) -> None:
    assert wanted_coding(said) == (Coding(name, must=True) if name else None)


class Counting:
    """A body that tells how much of it is taken at once."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.most = 0

    def __len__(self) -> int:
        return len(self.body)

    def __getitem__(self, at: int | slice) -> int | bytes:
        found = self.body[at]
        if isinstance(found, bytes):
            self.most = max(self.most, len(found))
        return found


def test_large_bodies_are_unpacked_little_at_a_time() -> None:
    content = random.Random(1).randbytes(3_000_000) + bytes(5_000_000)
    body = Counting(gzip.compress(content))
    assert decompress(body, "gzip", len(content)) == content  # type: ignore[arg-type]
    assert body.most <= 65536


@pytest.mark.parametrize("more", [0, 1])
def test_what_may_be_a_bomb_is_counted_first_and_kept_if_it_is_none(more: int) -> None:
    content = bytes(2_000_000 + more)
    body = gzip.compress(content)
    assert 2_000_000 // 1032 < len(body) <= 2_000_000 // 64
    if more:
        with pytest.raises(TooLarge):
            decompress(body, "gzip", 2_000_000)
    else:
        assert decompress(body, "gzip", 2_000_000) == content


def test_what_follows_the_end_inside_one_read_is_counted_and_not_read_for_ever() -> None:
    """A stream that ends while zlib still holds some of what it was given."""
    packed = zlib.compress(bytes(400_000)) + b"more"
    with pytest.raises(InvalidRequest, match="found 4 bytes after its end"):
        decompress(packed, "deflate", 1 << 20)
    whole = zlib.compress(bytes(64 * 1024))
    assert decompress(whole, "deflate", 1 << 20) == bytes(64 * 1024)
    with pytest.raises(InvalidRequest, match="after its end"):
        decompress(whole + b"x", "deflate", 1 << 20)
