"""Watchdog, exit status and signals of a run."""
