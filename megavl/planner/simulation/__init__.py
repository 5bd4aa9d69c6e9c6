"""Pipeline schedules, step times and modality mixing, simulated."""
