"""Devices by when their load lanes are free, against a plain sort."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.feasibility import Loaders
from clockwork_serve.units import ms
from tests.controller.clusters import belief

NAMES = [f"d{at}" for at in range(7)]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "end", "look", "lose"]), st.integers(0, 6), st.integers(1, 20)
    ),
    max_size=60,
)


@given(STEPS)
def test_the_soonest_come_first_whatever_happened(steps: list[tuple[str, int, int]]) -> None:
    made, loaders = belief(*NAMES), Loaders()
    for one in made.devices.values():
        loaders.joined(one)
    flying: dict[str, list[int]] = {name: [] for name in NAMES}
    now_ns = ms(100)
    for what, at, number in steps:
        now_ns += ms(number) // 4
        one = made.devices.get(NAMES[at])
        if one is None:
            continue
        if what == "send":
            flying[one.name].append(made.next_id())
            one.load.send(flying[one.name][-1], ms(number), now_ns)
            loaders.forget()
        elif what == "end" and flying[one.name]:
            one.load.end(flying[one.name].pop(0), now_ns - 1)
            loaders.lower(one, one.load.available_ns(now_ns))
            loaders.forget()
        elif what == "lose" and len(made.devices) > 1:
            loaders.lost(made.devices.pop(one.name))
        elif what == "look":
            truth = sorted(device.load.available_ns(now_ns) for device in made.devices.values())
            found = [loaders.get(place, now_ns) for place in range(len(truth))]
            assert [device.load.available_ns(now_ns) for device in found if device is not None] == truth
            assert len({id(device) for device in found}) == len(truth)
            assert loaders.get(len(truth), now_ns) is None
