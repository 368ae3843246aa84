"""Workers and gateways on other machines: the bridge, its links, tensors, artefacts."""
