"""Commit protocol, verification, retention and restricted reading of distributed checkpoints."""
