"""Prompt to tokens: preparation of inputs and decoding."""
