"""Flows: bijections with a base distribution, what they are made of, and mixtures of them."""
