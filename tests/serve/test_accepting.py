"""Who has to make room in a crowd, and who is turned away."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from collections import Counter

import pytest

from clockwork_serve.serve.accepting import PATIENCE_S, Acceptor, Strangers, network_of


def crowd(*networks: str) -> Strangers[str]:
    """One of each, as often as it is named: "a0", "b1" and so on."""
    found = Strangers[str]()
    for number, network in enumerate(networks):
        found.add(f"{network}{number}", network, float(number))
    return found


def test_the_oldest_of_the_network_that_has_most_makes_room() -> None:
    found = crowd("a", "b", "b", "b", "c", "c")
    assert found.displace("d", 6.0) == "b1"
    assert found.displace("a", PATIENCE_S / 2) is None, "it would have as many as any other"
    assert sorted(found) == ["a0", "b2", "b3", "c4", "c5"]


def test_a_network_that_has_most_already_makes_room_itself_in_time() -> None:
    found = crowd("b", "a", "a")
    assert found.displace("a", 1.0 + PATIENCE_S / 2) is None
    assert found.displace("a", 1.0 + PATIENCE_S) == "a1"


def test_where_all_have_one_the_oldest_makes_room_in_time() -> None:
    found = crowd("a", "b", "c")
    assert found.displace("d", PATIENCE_S / 2) is None
    assert found.displace("d", PATIENCE_S) == "a0"


def test_where_nobody_is_nobody_makes_room() -> None:
    found = crowd("a")
    assert found.displace("a", PATIENCE_S) == "a0"
    assert found.displace("a", 100.0) is None


def test_who_is_known_or_gone_makes_no_room() -> None:
    found = crowd("a", "a", "a", "b")
    for one in ("a0", "a1", "a1", "nobody"):
        found.discard(one)
    assert sorted(found) == ["a2", "b3"]
    assert found.displace("c", 100.0) in {"a2", "b3"}
    assert len(found) == 1


@pytest.mark.parametrize("seed", range(20))
def test_no_network_keeps_out_one_that_has_fewer(seed: int) -> None:
    """Against a list that is searched."""
    rng = random.Random(seed)
    found, model = Strangers[int](), dict[int, str]()
    for number in range(2000):
        network = rng.choice("aaaabbbcd") + str(rng.randrange(1 + seed % 4))
        counts = Counter(model.values())
        if len(model) >= 30:
            displaced = found.displace(network, float(number))
            most = max(counts.values())
            assert displaced is not None, "a second each: all have had their time"
            whose = model.pop(displaced)
            assert counts[whose] == most or counts[network] + 1 >= most
            assert displaced == min(one for one, its in [*model.items(), (displaced, whose)] if its == whose)
        found.add(number, network, float(number))
        model[number] = network
        if rng.random() < 0.1:
            gone = rng.choice(list(model))
            found.discard(gone)
            del model[gone]
        assert sorted(found) == sorted(model)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("?", "?"),
    ],
)
def test_a_network_is_what_one_may_have_by_having_an_address(host: str, network: str) -> None:
    assert network_of(host) == network


class Exhausted(socket.socket):
    """A listening socket where no descriptor is left, at first."""

    failures = 2

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_who_comes_when_no_descriptor_is_left_is_accepted_later() -> None:
    listening = Exhausted()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    accepted = asyncio.get_running_loop().create_future()
    acceptor = Acceptor(listening, lambda *found: accepted.set_result(found))
    with socket.create_connection(listening.getsockname()) as client:
        connected, host = await asyncio.wait_for(accepted, 60)
        assert (connected.getpeername(), host) == (client.getsockname(), "127.0.0.1")
        connected.close()
    acceptor.close()
    assert listening.fileno() < 0
