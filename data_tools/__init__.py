"""From raw data to shards: corpus builders, preprocessing and inspection."""
