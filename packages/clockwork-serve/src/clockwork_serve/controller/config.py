"""The controller's settings."""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_MS, NS_PER_S, NS_PER_US


class ControllerConfig(Struct, frozen=True, kw_only=True):
    """Settings of the controller; all times in ns.

    ``policy`` names one of ``policies.known_policies``. ``decide_ns``: how long after its arrival a request
    may wait for its yes or no; a yes is a promise (see ``promises``). Below 0: none is promised before it is
    sent. ``reject_infeasible`` rejects a request as soon as no schedule can meet its deadline
    (off: it expires at its deadline, as in the paper). ``look_ahead_ns``:
    lanes are topped up while they have less work than this (paper section 5.3: 5 ms). ``slack_ns``: plans end
    this much before the deadline. ``network_ns``: assumed delay to a worker. ``max_batch``: largest batch.
    ``max_exec_ns``: batches that take longer are not used (batch 1 always is). ``min_batch_gain``: a larger
    batch must save this share of the time per request. ``estimate_window`` and ``estimate_quantile``: an
    estimate is that quantile of that many last durations (paper: 10, 0.99). ``lag_ns``: while the running
    action is later than this, no further ones are sent. ``capacity_ns``: the horizon over which a device's
    demand is compared with what it can serve, when LOADs are ranked.
    ``retries``: how often a request that was in flight on a lost worker is planned again.
    ``quarantine_after``: a model that took this many workers down is quarantined (0: never).
    ``hang_ns``: an action that is late by more makes its worker hung (0: never; see ``hangs``); a worker that
    stays hung for another ``hang_grace_ns`` is killed.
    ``expected_devices``: the server is ready when this many are warm. ``first_id``: ids of actions and
    versions of weights are above this; a successor must not reuse those that workers have seen.
    """

    policy: str = "default"
    decide_ns: int = -1
    reject_infeasible: bool = True
    look_ahead_ns: int = 5 * NS_PER_MS
    slack_ns: int = 2 * NS_PER_MS
    network_ns: int = 200 * NS_PER_US
    max_batch: int = 16
    max_exec_ns: int = 250 * NS_PER_MS
    min_batch_gain: float = 0.03
    estimate_window: int = 10
    estimate_quantile: float = 0.99
    lag_ns: int = 10 * NS_PER_MS
    capacity_ns: int = 100 * NS_PER_MS
    retries: int = 1
    quarantine_after: int = 3
    hang_ns: int = 2 * NS_PER_S
    hang_grace_ns: int = 10 * NS_PER_S
    expected_devices: int = 1
    first_id: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.estimate_quantile <= 1:
            raise ConfigError(
                f"estimate_quantile: expected above 0 and up to 1; found {self.estimate_quantile}"
            )
        limits = {
            "look_ahead_ns": (self.look_ahead_ns, 1, NS_PER_S), "slack_ns": (self.slack_ns, 0, NS_PER_S),
            "network_ns": (self.network_ns, 0, NS_PER_S), "max_batch": (self.max_batch, 1, 1 << 16),
            "max_exec_ns": (self.max_exec_ns, 1, 3600 * NS_PER_S), "lag_ns": (self.lag_ns, 1, NS_PER_S),
            "estimate_window": (self.estimate_window, 1, 10_000), "retries": (self.retries, 0, 100),
            "capacity_ns": (self.capacity_ns, 1, 3600 * NS_PER_S),
            "quarantine_after": (self.quarantine_after, 0, 1000),
            "hang_ns": (self.hang_ns, 0, 3600 * NS_PER_S),
            "hang_grace_ns": (self.hang_grace_ns, 1, 3600 * NS_PER_S),
            "expected_devices": (self.expected_devices, 1, 1 << 20),
        }  # fmt: skip
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise ConfigError(f"{name}: expected {low} to {high}; found {value}")
