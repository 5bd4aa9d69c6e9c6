"""Builders of the small real corpus: collected text, a tokenizer, and drawn pictures with captions and questions."""
