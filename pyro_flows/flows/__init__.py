"""Flows: bijections with a base distribution, what they are made of, and mixtures of them."""

from pyro_flows.flows import images, vectors

__all__ = ["images", "vectors"]  # which register their builders
