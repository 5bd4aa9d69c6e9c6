"""Programs that the benchmark drivers run in processes of their own."""
