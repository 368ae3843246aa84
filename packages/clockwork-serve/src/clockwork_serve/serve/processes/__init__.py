"""What gateways, the controller, workers and the bridge run: one module each, started by ``python -m``."""
