"""Losses for Pyro's own SVI.

A model and a guide go in; the ELBO with path gradients, and steps of suitable size, come out. Read ``path_elbo.py``
first.
"""
