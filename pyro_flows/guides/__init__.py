"""Pyro guides that are flows, for ``fit`` and for a user's own SVI.

A model goes in, and its data at the first call; a guide with the sites of the model comes out. Read ``autoflow.py``
first; ``hierarchical.py`` has latents in plates, ``svi`` the losses. What a block of latents in plates is, given the
others, stands in ``conditional.py``; ``integrated.py`` begins the densities with these latents integrated out.
"""
