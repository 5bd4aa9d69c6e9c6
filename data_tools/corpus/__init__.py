"""Builders of image-text corpora: the demo corpus, and pairs of image and text."""
