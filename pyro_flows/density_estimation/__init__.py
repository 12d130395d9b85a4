"""From data to a fitted density."""
