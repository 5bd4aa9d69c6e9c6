"""Packed sequences for people: terminal and HTML."""
