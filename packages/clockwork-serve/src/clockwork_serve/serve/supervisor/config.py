"""What a server is made of; plain settings that start nothing."""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway.access import DoorConfig
from clockwork_serve.serve.remote.config import BridgeSettings
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB


class GatewaysConfig(Struct, frozen=True, kw_only=True):
    """Settings of the gateways of one machine.

    A port of 0 is chosen by the system; ``grpc_port`` and ``metrics_port`` may be None for off.
    ``default_slo_ns``: deadline of requests that name none (None: see the gateway). ``shared_memory``: the
    prefix of keys of shared memory that local clients may use (None: off). ``triton_codes``: what is refused
    or expired gets Triton's status. ``drain_s``: how long a stop waits for requests in flight.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002
    default_slo_ns: int | None = None
    gateways: int = 1
    region_bytes: int = 256 * MIB
    max_body_bytes: int = 64 * MIB
    model_control: bool = True
    shared_memory: str | None = None
    triton_codes: bool = False
    door: DoorConfig = DoorConfig()
    drain_s: float = 10.0
    stuck_s: float = 3.0
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        """Check what no part checks for itself. Raises :class:`ConfigError`."""
        if not 1 <= self.gateways <= 64:
            raise ConfigError(f"gateways: expected 1 to 64; found {self.gateways}")
        if self.region_bytes < 2 * self.max_body_bytes:
            raise ConfigError(
                f"region_bytes: expected at least twice max_body_bytes ({self.max_body_bytes}), for inputs "
                f"and outputs; found {self.region_bytes}"
            )
        if not 0 <= self.drain_s <= 3600:
            raise ConfigError(f"drain_s: expected 0 to 3600; found {self.drain_s}")
        if self.stuck_s and not 1 <= self.stuck_s <= 3600:
            raise ConfigError(f"stuck_s: expected 1 to 3600, or 0 for ever; found {self.stuck_s}")

    @property
    def ports(self) -> dict[str, int | None]:
        """The ports wanted, by setting."""
        return {
            "http_port": self.http_port,
            "grpc_port": self.grpc_port,
            "metrics_port": self.metrics_port,
        }


class ServerConfig(GatewaysConfig, frozen=True, kw_only=True):
    """Settings of ``clockwork serve``.

    ``repository`` is a folder in Triton's layout. ``compile_memory_bytes`` and ``compile_s``: what a
    preparation may take, and its silence. ``run_dir``: where the private folder of sockets is made (empty:
    XDG_RUNTIME_DIR or the temporary folder). ``pin``: each device gets cores of its own. ``machines``: where
    workers and gateways on other machines may join (None: nowhere).
    """

    repository: str
    store: StoreConfig
    devices: tuple[DeviceConfig, ...] = (DeviceConfig(device="cpu:0"),)
    controller: ControllerConfig = ControllerConfig()
    compile_memory_bytes: int = 0
    compile_s: float = 900.0
    journal: str = ""
    run_dir: str = ""
    pin: bool = False
    realtime: bool = False
    machines: BridgeSettings | None = None

    def __post_init__(self) -> None:
        """Check what no part checks for itself. Raises :class:`ConfigError`."""
        names = [config.device for config in self.devices]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"devices: expected at least one, each once; found {names}; correct --device")
        GatewaysConfig.__post_init__(self)
