"""Seconds to a right posterior: our fit against NUTS of Pyro and of NumPyro."""
