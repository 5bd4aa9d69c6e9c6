"""One thin module per command of the megavl CLI."""
