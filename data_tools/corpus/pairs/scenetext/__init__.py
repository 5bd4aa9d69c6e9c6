"""Images with rendered text: phrases on drawn or given backgrounds, rotated, skewed, shaded and degraded."""
