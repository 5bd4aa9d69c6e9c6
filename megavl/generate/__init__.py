"""Prompt to tokens: preparation of inputs and decoding."""

import megavl.parallel  # noqa: F401  # before any module imports megatron-core
