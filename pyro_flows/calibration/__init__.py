"""Many fits of one model side by side, and whether its posteriors are calibrated.

A model and many data sets, or its own simulations, go in; posteriors or a ``Calibration`` with ranks come out. Read
``fit_many.py`` first, then ``sbc.py``.
"""
