"""A plan as text, SVG and a timeline."""
