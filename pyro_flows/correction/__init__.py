"""Markov chains in the latent space of a flow: refinement, and the fallback of a fit."""
