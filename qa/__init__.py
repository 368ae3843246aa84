"""Quality assurance: what breaks, leaks or goes wrong under faults, attacks, long load and chance."""
