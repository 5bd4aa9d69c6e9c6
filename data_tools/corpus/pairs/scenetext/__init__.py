"""Text in scenes: words on drawn or given backgrounds, turned, tilted, shaded and disturbed."""
