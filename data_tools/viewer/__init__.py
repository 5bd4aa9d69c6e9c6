"""Shows packed sequences on the terminal and as HTML."""
