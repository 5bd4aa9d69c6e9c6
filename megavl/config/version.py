"""The version of this code, in one place: packaging reads it here, and datasets state what they were made with."""

VERSION = "0.2.0"
