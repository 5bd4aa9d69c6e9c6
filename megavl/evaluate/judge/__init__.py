"""Compares the answers of models: two by a judge at an endpoint, several by people on a rating page."""
