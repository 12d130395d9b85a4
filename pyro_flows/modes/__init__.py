"""The search for modes that a guide misses: exact moves, paths, tempering, walkers."""
