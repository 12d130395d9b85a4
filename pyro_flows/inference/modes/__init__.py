"""The search for regions that a guide misses: paths, tempering, walkers, symmetric images, tails.

A log density and what the guide covers go in; missed regions with their mass come out. Read ``missed_modes.py`` first.
"""
