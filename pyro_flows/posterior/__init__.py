"""The result of a fit: ``Posterior``, a frozen value, with what is done after a fit.

Draws with their log densities go in; summaries, new draws, predictions, files, comparisons, figures and reports come
out. Read ``posterior.py`` first.
"""
