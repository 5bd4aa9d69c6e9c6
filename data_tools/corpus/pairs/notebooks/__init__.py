"""Charts from notebooks with the code that drew them: stored figures, or figures drawn again in a sandbox."""
