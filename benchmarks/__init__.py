"""Benchmarks against posteriordb: ports of its posteriors to Pyro and the reader of its reference draws."""
