"""Posteriors of posteriordb with reference draws: ported models, our fits, Pyro's guides, the automatic stop."""
