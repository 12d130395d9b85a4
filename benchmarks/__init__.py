"""Benchmarks: posteriors with reference draws, densities of data, and the time of one step."""
