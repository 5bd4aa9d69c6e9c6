"""Cost of every block, layer split over pipeline stages, memory and step-time estimates."""
