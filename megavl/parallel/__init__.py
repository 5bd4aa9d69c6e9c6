"""Process groups, pipeline layout, broadcast of batches, and the CPU/gloo runtime."""
