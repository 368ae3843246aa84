"""More requests than the controller can process: the goodput left (``__main__``)."""
