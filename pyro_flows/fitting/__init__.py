"""From a Pyro model to a judged posterior: the stages of ``fit``, its methods and their order, and ``diagnose``.

A model, data and a budget go in; a ``Posterior`` with its verdict comes out. Read ``fit.py`` first, then
``methods.py``.
"""
