"""What grows with what."""
