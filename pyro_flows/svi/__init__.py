"""Losses for Pyro's own SVI."""
