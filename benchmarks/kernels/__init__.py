"""Moves of many chains, compared by effective draws for each gradient; see :mod:`benchmarks.kernels.__main__`."""
