"""Flows: bijections with a base distribution, what they are made of, and mixtures of them."""

from pyro_flows.flows import ensemble, images, parts, vectors

__all__ = ["ensemble", "images", "parts", "vectors"]  # which register their builders
