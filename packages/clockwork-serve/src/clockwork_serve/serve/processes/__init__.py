"""The main modules of gateways, the controller, workers and the bridge, each started by ``python -m``."""
