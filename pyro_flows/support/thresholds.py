"""All thresholds of k-hat, effective sample size, R-hat, shifts, evidence gaps and missed mass that decide in a fit.

Each comment has the unit, what the number decides, and its source. "Measured" stands for fits of the benchmarks, with
figures in the decision records. "Chosen" stands for a round number. Constants with one value that decide different
things stand next to each other. S is the number of draws, and an ESS share is ESS over S.

Sources:
    PSIS: Vehtari, Simpson, Gelman, Yao and Gabry 2024 (arXiv 1507.02646).
    Yao: Yao, Vehtari, Simpson and Gelman 2018 (arXiv 1802.02538).
    R-hat: Vehtari, Gelman, Simpson, Carpenter and Bürkner 2021 (arXiv 1903.08008).
    Nested R-hat: Margossian et al. 2024 (arXiv 2110.13017).
    Tails: Dekkers, Einmahl and de Haan 1989 (doi:10.1214/aos/1176347397).
"""

import math

# ---- k-hat: the estimated shape of the tail of importance weights ----------------------------------------------------
# Weights have a finite variance below 0.5, and a finite mean below 1 (PSIS).

# Averages by weighted draws need a k-hat below this, and below 1 - 1 / log10 S: the verdict, moments of a start, the
# mass of a region. Source: PSIS; Yao.
K_HAT_MOST = 0.7

# Weights have a finite variance below this: they correct results, a mixture or table is accepted, a round
# has nothing left to gain, the flow of a marginal is not fitted further, and a missed mode of nearly the mass that
# counts is ruled out without tempering. Source: PSIS (finite variance); measured
# (record 0033).
K_HAT_GOOD = 0.5

# Log ratio of the largest weight and the mean one: below this, weights have no tail, and k-hat counts as 0. Source:
# chosen.
LOG_WEIGHT_EVEN = math.log(1.5)
# Tail index of draws: from this on, quantiles replace moments; variances end at 0.5. Source: Tails; chosen.
TAIL_INDEX_HEAVY = 0.42
# Tail index of the model's own values: the same; fourth moments end at 0.25. Source: Tails.
TAIL_INDEX_FOURTH = 0.25

# ---- effective sample size of weighted draws, as a share of S --------------------------------------------------------

# Verdict, searches that go by weighted draws, and moments that replace those of a start: averages can be used from
# this on. Weights of a mixture, and of an amortized flow, are tempered so that as many draws are effective. Source:
# chosen.
ESS_SHARE_LEAST = 0.1

# From this on, a candidate is worth going on with: a mixture, a grid, a batch of training. A flow with less may lie
# between several modes. With k-hat below K_HAT_GOOD, weights are good whatever doubts a fit left, and in many fits.
# Amortized posterior: below it, weighted moments replace the flow if they reach it, and four times as many draws
# are weighed. Source: chosen.
ESS_SHARE_PROMISING = 0.5

# Below this, too few draws say where the mass is: no weighing of a start by thousands of draws, no chains from
# weighted draws, no independent proposals in MCMC, no new part of a mixture; and the density may have no smooth top.
# What adds less is in vain: a part of a mixture, or training, which ends there where MCMC can take over. Source:
# chosen.
ESS_SHARE_COLLAPSED = 0.02

# From this on, only the tail of the weights of a round can be in doubt, no part is added to a mixture, the flow of a
# marginal is not fitted further, and many fits try heavier tails. Source: measured (record 0016).
ESS_SHARE_GOOD = 0.9
# Weights are nearly even above this, so that fewer checks and draws suffice, and a start is not matched again; an
# infinite variance does not matter where they only narrow. Source: chosen.
ESS_SHARE_EVEN = 0.98

# ---- effective draws -------------------------------------------------------------------------------------------------

# MCMC of a fit, bulk and tail of the worst coordinate: 0.03 sd of a mean, 2 % of an sd. Chains end there. Source:
# chosen (R-hat asks for 400).
ESS_OF_CHAINS = 1000.0
# MCMC of a fit: from this on chains wait for no sd, which may not exist. Source: chosen.
ESS_OF_CHAINS_MOST = 4500.0
# Fewer draws estimate neither R-hat nor quantiles: MCMC of the caller, bulk and tail; chains of a fit get a larger
# budget from this on; fewer weighted draws are not compared with chains, and no flow of a marginal is fitted to them.
# Source: R-hat.
ESS_OF_MCMC = 400.0

# ---- R-hat -----------------------------------------------------------------------------------------------------------

# At most: rank-normalized, of single chains of the caller, and of the flows of several runs; nested, of superchains of
# a fit, which forget their common start. Source: R-hat; Nested R-hat.
R_HAT_CONVERGED = 1.01
# At most, of single chains of a fit, which are short: sqrt(1 + (autocorrelation time - 1) / draws). The same of
# groups of chains that began in different modes, of whether a chain is in a region, and of a round that ends warm-up.
# The same, split, of the ELBO and the moments of a flow over ten checks of training. Above it, nested, the first half
# of the draws of chains is discarded as warm-up. Source: chosen.
R_HAT_OF_SHORT_CHAINS = 1.05

# ---- divergences of MCMC, and Monte Carlo errors of its standard deviations ------------------------------------------

# MCMC of a fit: share of all trajectories, at most. With 0.7 %, an sd was 12 % too low. Source: measured (record
# 0026).
DIVERGENT_SHARE_OF_CHAINS = 0.0001
# MCMC of a fit: trajectories that may diverge of any number: one says next to nothing. Source: chosen.
DIVERGENT_FEW = 1
# MCMC of the caller: share of the draws, at most. MCMC of a fit: share from which on the step size is halved at once.
# Source: chosen.
DIVERGENT_SHARE_OF_MCMC = 0.001
# MCMC of a fit: standard error of an sd, as a part of it, at which chains end. Source: measured (record 0025).
SD_ERROR_OF_CHAINS = 0.04
# MCMC of a fit: the same, of heavy tails, while draws are few and cheap. Source: measured (record 0025).
SD_ERROR_OF_FEW_DRAWS = 0.02

# ---- shifts of means and standard deviations -------------------------------------------------------------------------

# Sds by which weighting may shift a mean, and log ratio by which it may change an sd, of draws that are used as they
# are. The same of mass that rounding loses next to a bound. The same of the model's own values, and of chains against
# weighted draws, beyond SHIFT_ERRORS. Standard error of an sd of chains, as a part of it, above which the verdict on
# them has a reason. Rows of a plate: relative error of an estimate of a row, above which its k-hat matters. Source:
# chosen.
SHIFT_MOST = 0.1
# Standard errors that SHIFT_MOST and SHIFT_SEEN are counted beyond, where they are compared with noise. Source: chosen.
SHIFT_ERRORS = 3.0
# Verdict: sds that weighting may shift a mean by, of draws that it corrects. Source: measured (record 0033).
MEAN_SHIFT_MOST = 1.0
# Verdict: log ratio that weighting may widen an sd by, of draws that it corrects. Source: measured (record 0033).
SD_WIDENING_MOST = math.log(2.0)
# Round: sds, and log ratio of sds, below which weighting changes nothing that shows in 4000 draws: 2.5 standard
# errors; beyond SHIFT_ERRORS. Rows of a plate: the same as ROW_ERROR_MOST, from which on each row gets twice as many
# draws. Amortized posterior: sds that a mean may be off by, of draws that are used as they are. Source: chosen.
SHIFT_SEEN = 0.04
# NICE: Var[log p] over that of the base, from which on the verdict is unreliable. Source: chosen.
VAR_LOG_P_RATIO_MOST = 5.0

# ---- gaps between log evidence and ELBO, in nats ---------------------------------------------------------------------

# Round: nothing is left to gain below the larger of this and the next one times the dimension. Many fits: at most, for
# training to end early; a grid is tried first if its log evidence is higher than the ELBO of a start by more. Source:
# measured (record 0016).
EVIDENCE_GAP_GOOD = 0.04
# Round: the same, in nats a dimension. Tables: nats between the last two rounds, a coordinate. Source: measured (record
# 0016).
EVIDENCE_GAP_GOOD_A_DIM = 0.002
# Nats that do not matter: a drift of training and what it may still gain, what the noise of a full covariance may cost,
# and a change of the log density by an exact symmetry. Source: chosen.
EVIDENCE_GAP_NEGLIGIBLE = 0.02
# Runs of a fit: between the largest and the smallest log evidence, at most. Source: chosen.
EVIDENCE_GAP_OF_RUNS = 0.3

# Rows of a plate: standard error of differences of the log density, from which on the draws are not used. Source:
# chosen; an error of this size moves a mean by as many sds at most.
ROW_ERROR_MOST = 0.2
# Rows of a plate: mean relative variance of the weights of a row, up to which rows count as normal. Source: chosen.
ROW_WEIGHTS_EVEN = 1e-4
# Latents in plates: sds between two modes, from which on the second counts. Source: chosen.
ROW_MODES_APART = 3.0
# The same: mass of the second mode of a row, as a part of that of the first, from which on it counts; height of one
# outside of plates. Source: chosen.
ROW_MODE_SHARE = 0.01
# The same: draws within an sd of the second mode, from which on it is integrated over. Source: chosen.
ROW_MODE_REACHED = 0.3

# ---- data ------------------------------------------------------------------------------------------------------------

# Amortized posterior: share of simulated data sets that may be as far out, at either end, as data that count as
# predicted by the prior. Fitted prior: share of draws of a normal distribution that lie farther out than what is known
# of it, shared among coordinates. Source: chosen.
PREDICTIVE_TAIL = 0.001

# ---- chains of fitted priors -----------------------------------------------------------------------------------------

# Fitted prior: sds by which a mean may be off, and log ratio by which an sd may, over all links of a chain; above it,
# there is a warning. Source: chosen; the goal of the table of chains.
PRIOR_ERROR_MOST = 0.15

# ---- missed mass, and density gaps -----------------------------------------------------------------------------------

# Missed mode: share of the mass that the guide covers; a region with more is missed. Amortized posterior: share of
# earlier draws' weight that a replaced flow may leave out. Source: chosen.
MISSED_MASS_SHARE = 0.02
# Missed mass next to the guide: standard errors that the share has to exceed; and of the mass of a region that chains
# have to visit, or that is measured by tempering too. Source: chosen.
MISSED_MASS_ERRORS = 2.0
# Short tail: share of the mass beyond a quantile that draws may lack. Comparison of chains: share of their draws beyond
# each of two quantiles. Missed mass next to the guide: share of weighted draws beyond the excess that counts as hardly
# reached. Source: chosen.
MISSED_MASS_OF_TAILS = 0.01
# Share of draws that counts as a tail. Short tail: beyond each of two quantiles; and probability by which quartiles of
# a grid may differ from those of the draws. Missed mass next to the guide: share of the walkers that get out; with
# fewer, the search ends. Starts: the lowest terms, which an ELBO leaves out. Mixtures: the share of wide parts. Rows of
# a plate: share of the draws of the others at which the error of a row may be unknown. Source: chosen.
TAIL_SHARE = 0.05
# Missed mode of chains: part of a region's mass that chains need. Missed mode: part of the mass that counts; above it,
# a place with uneven weights is tempered. Source: chosen.
REGION_MASS_SHARE = 0.5
# Missed mode: nats that log q falls short of log p by, at a place where the guide has too little density. Source:
# chosen.
DENSITY_GAP_OF_MODES = 7.0
# Missed mass next to the guide: the same, where walkers count, and at earlier draws of an amortized flow. Source:
# chosen.
DENSITY_GAP_OF_WALKERS = 3.0
# Nats below the best from which nothing counts: a start or a mode is left out, an image has no mass, and training goes
# back to its best check. Source: chosen.
DENSITY_GAP_OF_LOST = 20.0
# Nats below the highest density: the mass there is zero, at a wall or at the end of a grid. Source: chosen.
DENSITY_GAP_OF_NOTHING = 60.0
# Unverified mode: nats that tempering may lack of the guide's own mass; with more, it is made anew, ten times as
# slowly, and a region counts unless it has so much less. In 226 dimensions it lacked 33, in 125 it lacked 73, and
# places were no modes. A region that lacks up to so much to count is tempered as slowly too. Source: measured.
MASS_GAP_OF_TEMPERING = 10.0
# Unverified mode: nats a dimension between the guide's mass and that of Laplace's normal at its mode. Source: chosen.
MASS_GAP_OF_LAPLACE_A_DIM = 0.5
