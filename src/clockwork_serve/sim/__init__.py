"""The virtual-time driver: one heap, one seed, the machines that serve. It never copies a decision."""

from clockwork_serve.sim.cluster import Cluster
from clockwork_serve.sim.constants import Constants, read_constants
from clockwork_serve.sim.simulation import Simulation
from clockwork_serve.sim.tally import Tally

__all__ = ["Cluster", "Constants", "Simulation", "Tally", "read_constants"]
