"""What the whole package stands on, and nothing about flows or posteriors.

``checks.py`` and ``arguments.py`` take what a user passed, and return it valid or raise what was expected, what came,
and the remedy; ``thresholds.py`` holds each number that decides; ``process`` has seeds, clocks and checkpoints,
``files`` complete files, ``numbers`` tensors. Read ``thresholds.py`` first.
"""
