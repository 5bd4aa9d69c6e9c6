"""Use-case categories of fine-tuning data: the tree, tags on records, coverage, and weighted samples."""
