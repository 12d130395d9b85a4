"""Priors for new data that are fitted to the draws of a posterior.

A posterior and names of sites go in; a ``FittedPrior`` comes out, which a model samples as any distribution. Read
``fitted.py`` first, then ``making.py``.
"""
