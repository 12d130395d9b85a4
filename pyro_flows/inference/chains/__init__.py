"""Markov chains in the latent space of a flow: refinement, the fallback of a fit, and their judgement.

A posterior, or a flow with a log density, goes in; chains and a posterior whose draws are theirs come out. Read
``refine.py`` first.
"""
