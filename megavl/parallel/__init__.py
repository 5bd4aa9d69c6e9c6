"""Process groups, pipeline layout, broadcast of batches, and the CPU/gloo runtime."""

from megavl.config.releases import allow_missing_triton

# Before any module imports megatron-core.
allow_missing_triton()
