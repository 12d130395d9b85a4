# %% [markdown]
# # Quickstart: eight schools
#
# Eight schools coached their pupils for a test. Each school reports an estimate of the effect and its standard error.

# %%
import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf

# %% [markdown]
# ## When it goes wrong
#
# Read the verdict.
