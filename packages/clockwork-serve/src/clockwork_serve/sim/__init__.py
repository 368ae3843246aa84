"""The virtual-time driver: one heap, one seed, the machines that serve. It never copies a decision."""

from clockwork_serve.sim.constants import Cluster, Constants, read_constants
from clockwork_serve.sim.simulation import Simulation
from clockwork_serve.sim.tally import Tally

__all__ = ["Cluster", "Constants", "Simulation", "Tally", "read_constants"]
