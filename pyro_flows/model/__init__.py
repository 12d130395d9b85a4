"""A Pyro model as a function of one unconstrained vector."""
