"""Pyro guides that are flows."""
