"""Pyro guides that are flows, for ``fit`` and for a user's own SVI.

A model goes in, and its data at the first call; a guide with the sites of the model comes out. Read ``autoflow.py``
first; ``hierarchical.py`` has latents in plates, ``svi`` the losses.
"""
