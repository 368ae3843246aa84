"""Upper bounds on the goodput of any scheduler, for a workload that is known in advance."""
