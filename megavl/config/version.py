"""The version of this code. Packaging reads it here, and a dataset records the version that made it."""

VERSION = "0.2.0"
