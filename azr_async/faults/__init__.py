"""Instruments that break a run from outside and look, from outside, at what became of it. The product knows nothing of
them: they work on its processes, its socket files and what it has written."""
