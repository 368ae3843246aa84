"""Workers and gateways on other machines: the bridge, its links, transfer of artefacts."""
