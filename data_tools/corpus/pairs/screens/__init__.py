"""Screenshots of web pages with the HTML that produces them."""
