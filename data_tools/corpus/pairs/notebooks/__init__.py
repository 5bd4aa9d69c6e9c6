"""Charts from notebooks: the figures stored in the file, with the code that drew them."""
