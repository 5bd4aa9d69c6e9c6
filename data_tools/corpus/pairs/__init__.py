"""Image-text pairs from documents, notebooks, web pages and scene text."""
