"""Devices, links and calibrations of real ones."""
