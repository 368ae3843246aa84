"""Discrete-event simulator: drives the brains of controller and workers in virtual time, from one seed."""

from clockwork_serve.sim.constants import Cluster, Constants, read_constants
from clockwork_serve.sim.simulation import Simulation
from clockwork_serve.sim.tally import Tally

__all__ = ["Cluster", "Constants", "Simulation", "Tally", "read_constants"]
