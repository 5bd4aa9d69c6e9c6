"""SigLIP, SAM, adaptor table, fused first stage, decoder, and which parameters train in which stage."""

import megavl.parallel  # noqa: F401  # before any module imports megatron-core
