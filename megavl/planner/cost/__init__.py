"""Parameters, FLOPs, work and memory of every block."""
