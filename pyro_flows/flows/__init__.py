"""Flows: bijections with a base distribution, what they are made of, and mixtures of them.

A builder's name and options go in; a ``Flow`` comes out, a module that returns a Pyro distribution. Read ``flow.py``
first, then ``recipe.py``.
"""

from pyro_flows.flows import ensemble, images, parts, vectors

__all__ = ["ensemble", "images", "parts", "vectors"]  # which register their builders
