"""Public benchmarks, read from the files as they are published."""
