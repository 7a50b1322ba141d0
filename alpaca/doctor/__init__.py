"""Check this machine before a run fails on it."""
