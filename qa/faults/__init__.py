"""Faults injected into the real processes of a server under load: losses and recovery times.

``rows`` is the table of faults, as data; ``acts_*`` do them; ``run`` plays one row and says what is wrong
with it; ``kills`` are two longer scenarios; ``result`` writes the page, docs/develop/faults.md, which
explains it all.
"""
