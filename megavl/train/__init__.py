"""Optimizer, schedules, one step, the loop, metrics, signals."""

import megavl.parallel  # noqa: F401  # before any module imports megatron-core
