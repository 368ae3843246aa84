"""Estimates that a disturbance left high come down once it is over, and no others."""

from __future__ import annotations

import random

import pytest

from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.controller.estimates import UNIT, Estimator, Samples, Timings, drop_outliers
from clockwork_serve.messages import Infer, Load, Outcome, Profile
from clockwork_serve.units import MIB, ms
from tests.controller.honest import World, device, model, profile, serving


def window(*lasted_ms: float, seed_ms: float = 10) -> Samples:
    """Measured one after the other, the last one at 1 s."""
    samples = Samples(ms(seed_ms), size=10, quantile=0.99)
    for one in lasted_ms:
        samples.learn(ms(one), ms(1000))
    return samples


def timings(estimator: Estimator | None = None) -> Timings:
    """Of a code that takes 10 ms alone, 20 ms as a batch of four."""
    estimator = estimator or Estimator(window=10, quantile=0.99)
    estimator.learn_profile(
        Profile(
            code_id="c", device_kind="cpu", infer_ns={1: ms(10), 4: ms(20)}, load_base_ns=0, load_ns_per_mib=0
        )
    )
    return estimator.timings("d", "cpu", "c")


def reset_stale(samples: Samples, allowed_ns: int, now_ns: int) -> None:
    """Where nothing is known of other batches."""
    timings().reset_stale(samples, allowed_ns, now_ns)


class Cluster:
    """Two devices and the models a to d, asked for by chance."""

    def __init__(self, policy: str, *, slo_ms: float, pages: int = 16, load_ms: float = 2) -> None:
        self.world = World(ControllerConfig(policy=policy, hang_ns=0))
        self.world.serve(*[model(name) for name in "abcd"], times=profile(b1_ms=10, load_ms=load_ms))
        for number in range(2):
            self.world.join(device(f"d{number}", pages), worker=f"w{number}")
        self.slo_ms = slo_ms
        self._dice = random.Random(1)

    def asked(self, lasts_ms: float, rate_rps: float) -> float:
        """The share of the requests of so long that were answered in time."""
        world, ids = self.world, []
        end_ns = world.now_ns + ms(lasts_ms)
        while world.now_ns < end_ns:
            world.run(until_ms=self._dice.expovariate(rate_rps) * 1000)
            ids.append(world.request(self._dice.choice("abcd"), slo_ms=self.slo_ms))
        world.run(until_ms=self.slo_ms)
        return sum(world.answers[one].outcome is Outcome.OK for one in ids) / len(ids)

    def slow(self, factor: float, *devices: str) -> None:
        """What starts from now on takes longer there, and as long as usual elsewhere."""
        self.world.slow = dict.fromkeys(devices, factor)

    def started(self, name: str, kind: type = Infer) -> int:
        """How many actions were started on a device so far."""
        return sum(isinstance(one, kind) and one.device == name for _, _, one in self.world.started)

    def stop(self, name: str) -> None:
        """It stops for a second: the INFER that runs takes so much longer."""
        before = self.started(name)
        self.slow(100, name)
        while self.started(name) == before:
            self.world.run(until_ms=1)
            for one in "abcd":
                self.world.request(one, slo_ms=self.slo_ms)
        self.slow(1)
        self.world.run(until_ms=1000)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_device_that_stopped_for_a_second_serves_as_before_two_seconds_later(policy: str) -> None:
    cluster = Cluster(policy, slo_ms=200)
    assert cluster.asked(1000, 90) == 1
    cluster.stop("d0")
    cluster.asked(2000, 90)
    before = cluster.started("d0")
    assert cluster.asked(2000, 90) == 1
    assert cluster.started("d0") > before + 30, "half of it"


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_used_again_although_others_could_do_alone(policy: str) -> None:
    cluster = Cluster(policy, slo_ms=1000)
    for name in "abcd" * 32:  # so many at once that all have weights on both
        cluster.world.request(name, slo_ms=200)
    cluster.world.run()
    residencies = [one.residencies for one in cluster.world.controller._belief.models.values()]
    assert [len(one) for one in residencies] == [2, 2, 2, 2], "else this tests nothing"
    cluster.slo_ms = 200
    cluster.stop("d0")
    cluster.asked(1500, 40)
    before = cluster.started("d0")
    assert cluster.asked(1000, 40) == 1
    assert cluster.started("d0") > before


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("factor", "slo_ms", "rate_rps"), [(2.0, 20.2, 60), (30.0, 200, 90)])
def test_devices_that_were_slow_serve_as_before_two_seconds_later(
    policy: str, factor: float, slo_ms: float, rate_rps: float
) -> None:
    cluster = Cluster(policy, slo_ms=slo_ms)
    usual = cluster.asked(2000, rate_rps)
    cluster.slow(factor, "d0", "d1")
    assert cluster.asked(4000, rate_rps) < usual / 2
    cluster.slow(1)
    cluster.asked(2000, rate_rps)
    before = cluster.started("d0"), cluster.started("d1")
    assert cluster.asked(2000, rate_rps) > usual - 0.05
    cluster.asked(2000, 240)  # more than one could do alone
    assert cluster.started("d0") > before[0] + 5
    assert cluster.started("d1") > before[1] + 5


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_come_again_to_a_device_whose_loads_were_slow(policy: str) -> None:
    cluster = Cluster(policy, slo_ms=200, pages=4, load_ms=15)  # one model on each
    timings = cluster.world.controller._belief.devices["d0"].codes["c"].timings
    for _ in range(10):
        timings.load(4 * MIB).learn(ms(300), cluster.world.now_ns)
    assert cluster.asked(2000, 15) == 1, "by the other one alone"
    before = cluster.started("d0", Load)
    assert cluster.asked(2000, 15) == 1
    assert cluster.started("d0", Load) > before + 3


@pytest.mark.parametrize("what", ["load", "infer"])
def test_a_device_without_weights_that_was_slow_once_loads_them(what: str) -> None:
    world = serving("a", policy="paper")
    timings = world.controller._belief.devices["d0"].codes["c"].timings
    for _ in range(10):
        (timings.load(4 * MIB) if what == "load" else timings.infer(1, "")).learn(ms(300), world.now_ns)
    early = world.ask("a", slo_ms=200, until_ms=1000)
    late = [world.request("a", slo_ms=200), world.request("a", slo_ms=200)]
    world.run(until_ms=1000)
    assert world.answers[early].outcome is Outcome.REJECTED
    assert world.answers[late[1]].outcome is Outcome.OK
    assert world.answers[late[0]].outcome is (Outcome.OK if what == "load" else Outcome.REJECTED)


@pytest.mark.parametrize("before", [0, 20])
def test_trials_of_what_stays_slow_leave_most_of_the_lane_to_others(before: int) -> None:
    world = serving("a", policy="paper", hang_ns=0)
    for _ in range(before):
        world.ask("a", slo_ms=500, until_ms=100)
    world.slower = 30.0
    began_ns = world.now_ns
    for _ in range(400):
        world.ask("a", slo_ms=100, until_ms=50)
    tries = [one for start_ns, _, one in world.started if isinstance(one, Infer) and start_ns > began_ns]
    assert 12 < len(tries) < 28, "in 20 seconds, each of 300 ms; two at once"


def test_what_leaves_room_or_was_measured_just_now_or_could_not_help_is_left_alone() -> None:
    for samples, allowed_ms, now_ms in (
        (window(10, 900), 901, 9000), (window(10, 900), 50, 1999), (window(10, 900), 9, 9000),
    ):  # fmt: skip
        before = list(samples.samples)
        assert not drop_outliers(samples, ms(allowed_ms), ms(now_ms))
        reset_stale(samples, ms(allowed_ms), ms(now_ms))
        assert samples.samples == before


def test_what_is_in_the_way_is_forgotten_and_what_is_not_stays() -> None:
    samples = window(10, 14, 900, 60, 12)
    assert drop_outliers(samples, ms(50), ms(2000))
    assert samples.samples == [ms(10), ms(10), ms(14), ms(12)]


def test_where_all_is_in_the_way_the_profile_counts_until_the_next_measurement() -> None:
    samples = window(*[900] * 10)
    reset_stale(samples, ms(50), ms(2000))
    assert samples.estimate_ns == ms(10)
    samples.learn(ms(30), ms(2100))
    assert samples.estimate_ns == ms(30)


def test_after_a_trial_in_vain_the_next_one_waits_for_longer() -> None:
    samples = window(*[900] * 10)
    reset_stale(samples, ms(50), ms(2000))
    samples.learn(ms(900), ms(2000))
    reset_stale(samples, ms(50), ms(6499))
    assert samples.estimate_ns == ms(900)
    reset_stale(samples, ms(50), ms(6500))
    assert samples.estimate_ns == ms(10)
    samples.learn(ms(50), ms(6500))
    for _ in range(10):
        samples.learn(ms(900), ms(6500))
    reset_stale(samples, ms(50), ms(7500))
    assert samples.estimate_ns == ms(10), "the last one was not in vain"


def test_a_batch_is_expected_to_take_as_many_times_its_profile_as_another_one_did() -> None:
    one, four = (timings_of := timings()).infer(1, ""), timings_of.infer(4, "")
    for _ in range(2):
        if one.learn(ms(30), ms(1000)):
            timings_of.rescale(one, ms(1000))
    assert four.estimate_ns == ms(60), "it was never measured"
    assert timings_of.pace == 3 * UNIT
    assert timings_of.infer(8, "").estimate_ns == ms(120), "nor was one that nobody asked for until now"


def test_what_was_measured_is_not_reset_to_a_profile_that_others_contradict() -> None:
    one, four = (timings_of := timings()).infer(1, ""), timings_of.infer(4, "")
    for at in range(10):
        for samples, lasted_ms in ((four, 60), (one, 30)):
            if samples.learn(ms(lasted_ms), ms(1000 + at)):
                timings_of.rescale(samples, ms(1000 + at))
    timings_of.reset_stale(four, ms(40), ms(2008))
    assert four.estimate_ns == ms(60), "batch 1 took three times as long a moment ago"
    for at in range(10):
        if one.learn(ms(10), ms(3000 + at)):
            timings_of.rescale(one, ms(3000 + at))
    assert four.estimate_ns == ms(20), "it is as fast as it was"


def test_a_trial_is_made_where_nothing_else_tells_how_fast_a_device_is_now() -> None:
    samples = (timings_of := timings()).infer(1, "")
    for _ in range(10):
        if samples.learn(ms(30), ms(1000)):
            timings_of.rescale(samples, ms(1000))
    timings_of.reset_stale(samples, ms(20), ms(1500))
    assert samples.estimate_ns == ms(30)
    timings_of.reset_stale(samples, ms(20), ms(2000))
    assert samples.estimate_ns == ms(10)
