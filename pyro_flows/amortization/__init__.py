"""One conditional flow for all data sets of a form.

A model and the form of its data go in; an ``Amortized`` comes out, which gives a judged posterior for each data set.
Read ``amortize.py`` first, then ``amortized.py``.
"""
