"""Atomic and durable writes of files, with their hashes."""
