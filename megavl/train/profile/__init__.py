"""Step profiler, timeline and calibration of real steps."""
