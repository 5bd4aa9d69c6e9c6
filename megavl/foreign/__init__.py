"""Bounded reading of files from outside, and printing of their text."""
