"""Flow guides against Pyro's guides, in Pyro's SVI, at equal seconds."""
