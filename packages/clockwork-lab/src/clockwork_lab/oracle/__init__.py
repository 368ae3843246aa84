"""What no scheduler can exceed: upper bounds on goodput for a workload that is known beforehand."""
