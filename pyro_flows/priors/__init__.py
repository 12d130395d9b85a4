"""Priors for new data that are fitted to the draws of a posterior."""
