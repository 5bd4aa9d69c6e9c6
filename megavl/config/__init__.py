"""Recipes: frozen dataclasses, presets, YAML loading and cross-field checks."""
