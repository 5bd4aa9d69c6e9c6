"""Optimizer, schedules, one step, the loop, metrics, signals."""
