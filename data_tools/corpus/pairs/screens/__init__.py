"""Screenshots of web pages with their source, by a browser without scripts, network or files."""
