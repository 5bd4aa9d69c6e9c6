"""Commit protocol, verification, retention and restricted reading of distributed checkpoints."""

from megavl.config.releases import allow_missing_triton

# Before any module imports megatron-core.
allow_missing_triton()
