"""Flows as priors and posteriors of latents: chains of batches, and autoencoders."""
