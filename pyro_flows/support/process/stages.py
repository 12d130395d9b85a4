"""Names of the parts and stages of a fit, as progress lines, notes of a time limit and ``posterior.history`` show them.

A part is some work that a clock can end, and a stage is an entry of the history. Parts are activities, stages things.
"""

from __future__ import annotations

# parts
READING, FIT, TRAINING, JUDGING = "reading the model", "the fit", "training", "judging"
TRACING = "tracing"
PROPRIETY = "checking posterior propriety"
PARAMETERIZING = "choosing a parameterization"
TRANSFORMS = "choosing transforms for angles and heavy tails"
STARTS = "finding starting points"
MODES, PATHS, ELBOS = "optimizing to modes", "running Pathfinder", "comparing ELBOs of starting points"
MOMENTS = "matching moments"
BEST_START = "checking the best starting point"
INDEPENDENCE = "checking for independent coordinates"
SEVERAL = "checking for several modes"
WEIGHTS = "checking importance weights"
ROWS = "checking rows"
SAMPLER, AT_ONCE, NEXT = "running MCMC", "running MCMC instead of training", "running MCMC instead of more training"
VARIANCE = "checking the variance of the log density"
COMPARING = "comparing runs"
MISSED, MISSED_BY_CHAINS = "searching for missed modes", "searching for modes missed by chains"
TAILS = "checking marginal tails"
SYMMETRIC = "finding symmetric modes"
ADDED_RUN = "training at a missed mode"

# stages; those that are also methods have the names of these, see ``inference/verdict/methods.py``
PARAMETERIZATION, SITE_TRANSFORMS = "parameterization", "site transforms"
FIRST_ROUND, INITIAL = "first round", "initial Gaussian"
SEARCH, SEARCH_BY_CHAINS = "search for missed modes", "search for modes missed by chains"
