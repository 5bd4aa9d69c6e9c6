"""Input formats: finding records in files, and turning each into text and images."""
