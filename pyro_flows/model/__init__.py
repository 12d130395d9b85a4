"""A Pyro model as a function of one unconstrained vector.

A model and its arguments go in; a ``LogDensity`` with gradients, constrained values and likelihoods comes out. Read
``log_density.py`` first; ``graphs`` runs what was traced.
"""
