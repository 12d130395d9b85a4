"""The judgement of draws: importance weights, k-hat, diagnostics of chains, and what a user reads of them.

Log densities of draws go in; weights and a ``Verdict`` come out. Read ``deciding.py`` first; its thresholds stand in
``support``.
"""
