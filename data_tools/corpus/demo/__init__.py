"""The demo corpus: text, tokenizer, drawn pictures with questions."""
