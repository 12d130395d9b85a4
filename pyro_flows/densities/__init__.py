"""From data to a fitted density: splits, schedules, checkpoints, and an estimator for scikit-learn.

Points, and a context if there is one, go in; a ``DensityFit`` with its flow comes out. Read ``fit_density.py`` first.
"""
