"""The demo corpus: collected text, a tokenizer, and drawn pictures with captions and questions."""
