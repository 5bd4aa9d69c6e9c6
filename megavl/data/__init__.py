"""Shard format, tokenizer, chat template, label mask, packing, modality plan, sampler, loader."""
