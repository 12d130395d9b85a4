"""Recorded tensor programs: written down once, run many times."""
